"""Custom losses of many kinds: the window's gradient equals that of one batch in plain PyTorch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from ftaccum import test_fine_tuning
from heads import CLASSES, HEADS, RecordingOptimizer, one_batch, relative_error

WEIGHT = torch.tensor([1.0, 4.0, 0.25]).double()
TAGS = HEADS["token classification, BERT"]


def one_window(model: nn.Module, rows: Any, wanted: Tensor, **arguments: Any) -> float:
    """Return the relative gradient error of one window of all rows against `wanted`, the loss of one batch."""
    wanted.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    optimizer = RecordingOptimizer(model)
    test_fine_tuning(
        model, train_data=rows, optimizer=optimizer, n_epochs=1, validation_split=0.0, batch_size=2,
        effective_batch_size=len(rows), gradient_clip_norm=None, on_inexact="error", progress=False, **arguments,
    )  # fmt: skip
    return relative_error(optimizer.gradients[0], gradient)


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted classes"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_of_rows(weight: Tensor | None, smoothing: float, reduction: str) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = [(torch.randn(4, generator=draw).double(), torch.tensor([0, 2, 1, 2, -100][n % 5])) for n in range(11)]
    torch.manual_seed(0)
    model = nn.Linear(4, CLASSES).double()
    inputs, targets = (torch.stack(column) for column in zip(*rows, strict=True))
    loss_fn = nn.CrossEntropyLoss(weight, label_smoothing=smoothing)
    given = nn.CrossEntropyLoss(weight, label_smoothing=smoothing, reduction=reduction)
    count = (
        {"count_items": lambda b: WEIGHT[b[1][b[1] >= 0]].sum()} if reduction == "sum" and weight is not None else {}
    )
    wanted = loss_fn(model(inputs), targets)
    assert one_window(model, rows, wanted, loss_fn=given, reduction=reduction, **count) < 1e-12


def smoothed(outputs: Any, batch: Any) -> Tensor:
    return F.cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.1)


def focal(outputs: Any, batch: Any) -> Tensor:
    each = F.cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    counted = batch["labels"].flatten() != -100
    return ((1 - (-each).exp()) ** 2 * each)[counted].mean()


def per_row(outputs: Any, batch: Any) -> Tensor:
    each = F.cross_entropy(outputs.logits.transpose(1, 2), batch["labels"], reduction="none")
    return (each.sum(1) / (batch["labels"] != -100).sum(1)).mean()


def two_terms(outputs: Any, batch: Any) -> dict[str, Tensor]:
    return {"tags": smoothed(outputs, batch), "rows": 0.3 * per_row(outputs, batch)}


@pytest.mark.parametrize("loss_fn", [smoothed, focal, per_row, two_terms])
def test_losses_of_labelled_tokens(loss_fn: Any) -> None:
    model, rows = TAGS.model(), TAGS.rows()
    batch = one_batch(rows)
    outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
    found = loss_fn(outputs, batch)
    assert one_window(model, rows, sum(found.values()) if isinstance(found, dict) else found, loss_fn=loss_fn) < 1e-12


class Tagger(nn.Module):
    """A model that ignores a label other than -100."""

    def __init__(self, ignored: int, *, as_module: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(61, 8), nn.Linear(8, CLASSES)
        self.loss_fct = nn.CrossEntropyLoss(ignore_index=ignored) if as_module else None
        self.ignored = ignored
        self.double()

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits_NV, labels_N = self.head(self.embed(input_ids)).flatten(0, 1), labels.flatten()
        if self.loss_fct is not None:
            return {"loss": self.loss_fct(logits_NV, labels_N)}
        return {"loss": F.cross_entropy(logits_NV, labels_N, ignore_index=self.ignored)}


@pytest.mark.parametrize("lengths", [(3, 4, 6), (5,)], ids=["unlike", "alike"])
def test_the_ignore_index_of_a_module_in_the_model_is_used(lengths: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    ids_BL, labels_BL = torch.zeros(30, max(lengths), dtype=torch.long), torch.full((30, max(lengths)), 7)
    for n, (ids_L, labels_L) in enumerate(zip(ids_BL, labels_BL, strict=True)):
        length = lengths[n % len(lengths)]
        ids_L[:length] = torch.randint(1, 61, (length,), generator=draw)
        labels_L[: length - n % 2] = torch.randint(CLASSES, (length - n % 2,), generator=draw)
    rows = [
        {"input_ids": ids_BL[n, : lengths[n % len(lengths)]], "labels": labels_BL[n, : lengths[n % len(lengths)]]}
        for n in range(30)
    ]
    model = Tagger(7, as_module=True)
    assert one_window(model, rows, model(ids_BL, labels_BL)["loss"]) < 1e-9


def test_a_loss_with_a_hidden_ignore_index_is_counted() -> None:
    labels_BL = torch.randint(CLASSES, (30, 5), generator=torch.Generator().manual_seed(0))
    labels_BL[17, 2:] = 7
    ids_BL = torch.arange(150).reshape(30, 5) % 61
    model = Tagger(7, as_module=False)
    rows = [{"input_ids": ids_L, "labels": labels_L} for ids_L, labels_L in zip(ids_BL, labels_BL, strict=True)]
    assert one_window(model, rows, model(ids_BL, labels_BL)["loss"]) < 1e-9


def test_a_loss_of_hidden_states_gets_each_layer_once() -> None:
    numbers = []

    def loss_fn(outputs: Any, batch: Any) -> Tensor:
        numbers.append(len(outputs.hidden_states))
        return F.cross_entropy(outputs.logits, batch["labels"])

    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        output_hidden_states=True,
    )  # fmt: skip
    rows = [{"input_ids": [n + 1, 2, 3], "labels": n % 2} for n in range(6)]
    model = BertForSequenceClassification(config)
    test_fine_tuning(model, train_data=rows, loss_fn=loss_fn, n_epochs=1, validation_split=0.0, verbosity="quiet")
    assert set(numbers) == {3}
    assert len(model(torch.tensor([[1, 2]])).hidden_states) == 3
