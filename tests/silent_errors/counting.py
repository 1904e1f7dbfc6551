"""Losses that are means over fewer or other items than a sample of four rows shows."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from .case import case, update_error

_LLAMA = LlamaConfig(
    vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, pad_token_id=0,
)  # fmt: skip


def _vectors(n_rows: int) -> Tensor:
    return torch.randn(n_rows, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _linear(n_classes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(8, n_classes).double()


def _error_of_tuples(loss_fn: Any, labels: Tensor, n_classes: int = 3, data: Any = None) -> float:
    inputs = _vectors(len(labels))
    return update_error(
        _linear(n_classes),
        list(zip(inputs, labels, strict=True)) if data is None else data(inputs, labels),
        lambda model: loss_fn(model(inputs), labels),
        len(labels),
        batch_size=4,
        loss_fn=loss_fn,
    )


def _weighted(n_classes: int, **weights: float) -> Any:
    weight = torch.ones(n_classes, dtype=torch.float64)
    for name, value in weights.items():
        weight[int(name.removeprefix("w"))] = value
    return lambda outputs, targets: F.cross_entropy(outputs, targets, weight=weight)


def _labels(n_rows: int, **rare: tuple[int, ...]) -> Tensor:
    labels = torch.arange(n_rows) % 2
    for name, places in rare.items():
        labels[list(places)] = int(name.removeprefix("l"))
    return labels


@case(6, "class weights in a function of the user's own, of a rare class")
def weights_of_a_rare_class() -> float:
    return _error_of_tuples(_weighted(3, w2=20.0), _labels(400, l2=(17, 90, 211, 333)))


@case(6, "class weights in a function, rows of a TensorDataset", slow=True)
def weights_in_a_tensor_dataset() -> float:
    return _error_of_tuples(_weighted(3, w2=20.0), _labels(400, l2=(317, 390)), data=TensorDataset)


@case(6, "class weights bound by functools.partial", slow=True)
def weights_in_a_partial() -> float:
    weight = torch.tensor([1.0, 1.0, 20.0], dtype=torch.float64)
    return _error_of_tuples(functools.partial(F.cross_entropy, weight=weight), _labels(400, l2=(17, 90)))


@case(6, "class weights and 255 ignored, in a module around the loss", slow=True)
def weights_in_a_module() -> float:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.tensor([1.0, 1.0, 20.0], dtype=torch.float64)
            self.inner = nn.CrossEntropyLoss(weight=weight, ignore_index=255)

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return self.inner(outputs, targets)

    return _error_of_tuples(Loss(), _labels(400, l2=(17, 90), l255=(33, 44)))


@case(6, "class weights and label smoothing and 255 ignored, in a lambda")
def weights_and_smoothing() -> float:
    weight = torch.tensor([1.0, 1.0, 20.0], dtype=torch.float64)
    loss_fn = lambda o, y: F.cross_entropy(o, y, weight=weight, ignore_index=255, label_smoothing=0.1)
    return _error_of_tuples(loss_fn, _labels(400, l2=(17, 90), l255=(21, 91)))


@case(6, "class weights in one term of a dict")
def weights_in_one_term() -> float:
    weigh, labels, inputs = _weighted(3, w2=20.0), _labels(400, l2=(17, 90)), _vectors(400)
    loss_fn = lambda outputs, targets: {"class": weigh(outputs, targets), "size": outputs.pow(2).mean()}
    return update_error(
        _linear(3), list(zip(inputs, labels, strict=True)),
        lambda model: sum(loss_fn(model(inputs), labels).values()), 400, batch_size=4, loss_fn=loss_fn,
    )  # fmt: skip


@case(6, "class weights in a function, `count_items` that leaves them out", refused=r"row 17: 20 times.*`count_items`")
def weights_and_a_wrong_count() -> float:
    weigh, labels, inputs = _weighted(3, w2=20.0), _labels(400, l2=(17, 90)), _vectors(400)
    return update_error(
        _linear(3), list(zip(inputs, labels, strict=True)), lambda model: weigh(model(inputs), labels), 400,
        batch_size=4, loss_fn=weigh, count_items=lambda batch: len(batch[1]),
    )  # fmt: skip


@case(6, "class weights in a function, more classes than rows to look at", refused="weigh")
def weights_of_too_many_classes() -> float:
    labels = torch.arange(1000) % 100
    labels[17] = 100
    return _error_of_tuples(_weighted(101, w100=50.0), labels, n_classes=101)


@case(6, "class weights in a function, labels in a column of the user's own")
def weights_in_a_column_of_ones_own() -> float:
    labels, inputs = _labels(200, l2=(17, 90)), _vectors(200)
    weigh = _weighted(3, w2=20.0)
    rows = [{"input": x, "y": int(y)} for x, y in zip(inputs, labels, strict=True)]
    return update_error(
        _linear(3), rows, lambda model: weigh(model(inputs), labels), 200, batch_size=4,
        loss_fn=lambda outputs, batch: weigh(outputs, batch["y"]),
    )  # fmt: skip


class _Tagger(nn.Module):
    def __init__(self, loss: Any, n_classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.loss = nn.Embedding(61, 8), nn.Linear(8, n_classes), loss
        self.double()

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.embed(input_ids).cumsum(1).tanh())
        return {"loss": self.loss(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def _error_of_tagger(loss: Any, rare: int, n_classes: int) -> float:
    draw = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(1, 61, (200, 6), generator=draw), torch.randint(3, (200, 6), generator=draw)
    labels[17, 2:4], labels[90, 1] = rare, rare
    rows = [{"input_ids": i.tolist(), "labels": y.tolist()} for i, y in zip(ids, labels, strict=True)]
    return update_error(
        _Tagger(loss, n_classes), rows, lambda model: model(ids, labels)["loss"], len(rows), batch_size=4
    )


@case(6, "class weights of tags inside the model")
def weights_of_tags() -> float:
    return _error_of_tagger(_weighted(4, w3=20.0), rare=3, n_classes=4)


@case(7, "tags that the loss inside the model ignores by a number of its own")
def tags_ignored() -> float:
    return _error_of_tagger(lambda o, y: F.cross_entropy(o, y.masked_fill(y == 3, -100)), rare=3, n_classes=4)


@case(7, "a `keep` column with a flag for each token")
def keep_tokens() -> float:
    draw = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(1, 61, (200, 6), generator=draw), torch.randint(3, (200, 6), generator=draw)
    keep = torch.ones(200, 6, dtype=torch.long)
    keep[17, 2:] = keep[90, :3] = 0
    columns = {"labels": labels, "keep": keep}

    def loss_fn(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        losses = F.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        return (losses * batch["keep"].flatten()).sum() / batch["keep"].sum()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(61, 8), nn.Linear(8, 3)).double()
    rows = [
        {"input": i.tolist(), "labels": y.tolist(), "keep": k.tolist()}
        for i, y, k in zip(ids, labels, keep, strict=True)
    ]
    return update_error(model, rows, lambda model: loss_fn(model(ids), columns), 200, batch_size=4, loss_fn=loss_fn)


@case(7, "two labels left out by their numbers", slow=True)
def two_labels_left_out() -> float:
    labels = _labels(400, l254=(17, 90), l255=(21, 91))
    return _error_of_tuples(lambda o, y: F.cross_entropy(o[y < 254], y[y < 254]), labels)


@case(7, "255 ignored in a lambda", slow=True)
def ignored_in_a_lambda() -> float:
    labels = _labels(400, l255=(17, 90, 211, 333))
    return _error_of_tuples(lambda o, y: F.cross_entropy(o, y, ignore_index=255), labels)


@case(7, "a label with a period of the rows, left out by its number")
def ignored_with_a_period() -> float:
    labels = _labels(400, l2=tuple(range(9, 400, 29)))
    return _error_of_tuples(lambda o, y: F.cross_entropy(o[y != 2], y[y != 2]), labels)


@case(7, "values missing from a multi-hot vector, -1 left out of a mean")
def missing_values() -> float:
    inputs = _vectors(200)
    targets = (torch.rand(200, 3, generator=torch.Generator().manual_seed(2)) < 0.5).double()
    targets[17, 1] = targets[90, :2] = -1.0

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        known = targets >= 0
        return F.binary_cross_entropy_with_logits(outputs[known], targets[known])

    return update_error(
        _linear(3), list(zip(inputs, targets, strict=True)), lambda model: loss_fn(model(inputs), targets), 200,
        batch_size=4, loss_fn=loss_fn,
    )  # fmt: skip


@case(7, "void pixels, ignored in a lambda")
def void_pixels() -> float:
    draw = torch.Generator().manual_seed(3)
    images = torch.randn(40, 3, 6, 6, generator=draw, dtype=torch.float64)
    masks = torch.randint(3, (40, 6, 6), generator=draw)
    masks[7, :4], masks[29, 2:] = 255, 255
    torch.manual_seed(0)
    loss_fn = lambda outputs, targets: F.cross_entropy(outputs, targets, ignore_index=255)
    return update_error(
        nn.Conv2d(3, 3, 3, padding=1).double(), list(zip(images, masks, strict=True)),
        lambda model: loss_fn(model(images), masks), 40, batch_size=4, loss_fn=loss_fn,
    )  # fmt: skip


def _error_of_column(values: Tensor, loss_fn: Any) -> float:
    inputs, labels = _vectors(200), torch.arange(200) % 3
    rows = [{"input": x, "labels": int(y), "keep": k.item()} for x, y, k in zip(inputs, labels, values, strict=True)]
    whole = {"labels": labels, "keep": values}
    return update_error(
        _linear(3), rows, lambda model: loss_fn(model(inputs), whole), 200, batch_size=4, loss_fn=loss_fn
    )


@case(7, "a `keep` column that leaves rows out")
def keep_column() -> float:
    keep = torch.ones(200)
    keep[[17, 90, 91]] = 0

    def loss_fn(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        kept = batch["keep"] > 0
        return F.cross_entropy(outputs[kept], batch["labels"][kept])

    return _error_of_column(keep.long(), loss_fn)


def _weighted_by_keep(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    losses = F.cross_entropy(outputs, batch["labels"], reduction="none")
    return (losses * batch["keep"]).sum() / batch["keep"].sum()


@case(25, "a 0/1 column of row weights, and labels that are measurements")
def zero_weights_of_measurements() -> float:
    inputs, keep = _vectors(200), torch.ones(200, dtype=torch.float64)
    labels = torch.randn(200, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    keep[[17, 90, 91]] = 0
    whole = {"labels": labels, "keep": keep}
    loss_fn = lambda outputs, b: (b["keep"] * (outputs[:, 0] - b["labels"]).square()).sum() / b["keep"].sum()
    rows = [{"input": x, "labels": y, "keep": k} for x, y, k in zip(inputs, labels, keep, strict=True)]
    return update_error(
        _linear(1), rows, lambda model: loss_fn(model(inputs), whole), 200, batch_size=4, loss_fn=loss_fn
    )


@case(25, "a 0/1 column of row weights, and many classes")
def zero_weights_of_many_classes() -> float:
    inputs, labels, keep = _vectors(200), torch.arange(200) % 41, torch.ones(200, dtype=torch.float64)
    keep[[17, 90, 91]] = 0
    whole = {"labels": labels, "keep": keep}
    rows = [{"input": x, "labels": y, "keep": k} for x, y, k in zip(inputs, labels, keep, strict=True)]
    return update_error(
        _linear(41), rows, lambda model: _weighted_by_keep(model(inputs), whole), 200, batch_size=4,
        loss_fn=_weighted_by_keep,
    )  # fmt: skip


@case(26, "measurements with NaN where they are missing, in few rows")
def missing_measurements() -> float:
    labels = torch.randn(200, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    labels[[17, 90, 91]] = torch.nan

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        known = ~targets.isnan()
        return F.mse_loss(outputs[known, 0], targets[known])

    return _error_of_tuples(loss_fn, labels, n_classes=1)


@case(26, "a mask over the outputs of a row, without labels of its shape")
def mask_of_outputs() -> float:
    inputs, mask = _vectors(200), torch.ones(200, 3, dtype=torch.float64)
    mask[[17, 90], 1:] = 0
    whole = {"y": inputs[:, :3], "mask": mask}
    loss_fn = lambda outputs, b: (b["mask"] * (outputs - b["y"]).square()).sum() / b["mask"].sum()
    rows = [{"input": x, "y": y, "mask": m} for x, y, m in zip(inputs, whole["y"], mask, strict=True)]
    return update_error(
        _linear(3), rows, lambda model: loss_fn(model(inputs), whole), 200, batch_size=4, loss_fn=loss_fn
    )


@case(7, "a column of row weights that the loss divides by")
def weight_column() -> float:
    weights = torch.ones(200, dtype=torch.float64)
    weights[[17, 90, 91]] = 7.5
    return _error_of_column(weights, _weighted_by_keep)


@case(7, "pad tokens left out of the next-token loss by their id")
def pad_tokens_left_out() -> float:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model, self.config = LlamaForCausalLM(_LLAMA).double(), _LLAMA

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.model(input_ids).logits[:, :-1]
            targets = labels.masked_fill(labels == 0, -100)[:, 1:]
            return {"loss": F.cross_entropy(logits.flatten(0, 1), targets.flatten())}

    ids = torch.randint(1, 61, (100, 7), generator=torch.Generator().manual_seed(4))
    ids[[17, 60, 90], 4:] = 0
    rows = [{"input_ids": i.tolist(), "labels": i.tolist()} for i in ids]
    return update_error(Wrapped(), rows, lambda model: model(ids, ids)["loss"], len(rows), batch_size=4)
