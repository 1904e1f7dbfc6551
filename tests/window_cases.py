"""Losses that read all rows of an update, each with a model, rows, and the same loss on one batch in plain PyTorch.

Nothing here uses ftaccum: `Case.reference` collates the rows itself, and computes the loss in code of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, CLIPConfig, CLIPModel

from heads import PAD, VOCABULARY, Row

N_ROWS = 13

_BERT = {
    "vocab_size": VOCABULARY, "pad_token_id": PAD, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_CLIP_SIZE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "attention_dropout": 0.0,
}  # fmt: skip


class BiEncoder(nn.Module):
    """A tower for questions, a tower for answers, and a temperature that only the loss reads."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.questions, self.answers = nn.Embedding(VOCABULARY, 8), nn.Embedding(VOCABULARY, 8)
        self.shared, self.dropout = nn.Linear(8, 8), nn.Dropout(dropout)
        self.log_scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, input_ids: Tensor, answer_ids: Tensor) -> dict[str, Tensor]:
        return {
            "questions": self._encoded(self.questions, input_ids),
            "answers": self._encoded(self.answers, answer_ids),
        }

    def _encoded(self, tower: nn.Module, ids_BL: Tensor) -> Tensor:
        mask_BL1 = (ids_BL != PAD).unsqueeze(-1)
        pooled_BD = (tower(ids_BL) * mask_BL1).sum(1) / mask_BL1.sum(1)
        return self.dropout(self.shared(pooled_BD).tanh())


class Averaging(nn.Module):
    """An encoder that averages over padding, too, so that a row's values depend on the width of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids).mean(1).tanh())


def info_nce(one_ND: Tensor, other_ND: Tensor, log_scale: Tensor) -> Tensor:
    scores_NN = F.normalize(one_ND, dim=-1) @ F.normalize(other_ND, dim=-1).t() * log_scale.exp()
    here_N = torch.arange(len(scores_NN), device=scores_NN.device)
    return (F.cross_entropy(scores_NN, here_N) + F.cross_entropy(scores_NN.t(), here_N)) / 2


def info_nce_again(one_ND: Tensor, other_ND: Tensor, log_scale: Tensor) -> Tensor:
    """The same loss, written with logarithms of sums of exponentials."""
    one_ND, other_ND = (x / x.norm(dim=1, keepdim=True) for x in (one_ND, other_ND))
    scores_NN = torch.exp(log_scale) * torch.einsum("nd,md->nm", one_ND, other_ND)
    right_N = scores_NN.diagonal()
    return 0.5 * ((scores_NN.logsumexp(1) - right_N).mean() + (scores_NN.logsumexp(0) - right_N).mean())


def ranking(scores: Any, batch: Any) -> Tensor:
    """Return the mean logistic loss over pairs of rows of one group, the better row against the worse."""
    s_N = scores.reshape(-1)
    same_NN = batch["group"][:, None] == batch["group"][None]
    better_NN = batch["grade"][:, None] > batch["grade"][None]
    return F.softplus(s_N[None] - s_N[:, None])[same_NN & better_NN].mean()


def ranking_again(s_N: Tensor, rows: Sequence[Row]) -> Tensor:
    pairs = [
        (n, m)
        for n, one in enumerate(rows)
        for m, other in enumerate(rows)
        if one["group"] == other["group"] and one["grade"] > other["grade"]
    ]
    return torch.stack([torch.log(1 + torch.exp(s_N[m] - s_N[n])) for n, m in pairs]).sum() / len(pairs)


def cox(risks: Any, batch: Any) -> Tensor:
    """Return the negative log partial likelihood per event, with Breslow's treatment of ties."""
    r_N, time_N, event_N = risks.reshape(-1), batch["time"], batch["event"]
    at_risk_NN = time_N[None] >= time_N[:, None]
    log_sums_N = r_N[None].expand(len(r_N), -1).masked_fill(~at_risk_NN, -torch.inf).logsumexp(1)
    return ((log_sums_N - r_N) * event_N).sum() / event_N.sum()


def cox_again(r_N: Tensor, rows: Sequence[Row]) -> Tensor:
    parts = []
    for n, row in enumerate(rows):
        if row["event"]:
            others = [m for m, other in enumerate(rows) if other["time"] >= row["time"]]
            parts.append(torch.log(r_N[others].exp().sum()) - r_N[n])
    return torch.stack(parts).mean()


def by_position(scores: Any, batch: Any) -> Tensor:  # noqa: ARG001
    """Return a loss of which each row's weight is its place in the update, and neighbors are compared."""
    s_N = scores.reshape(-1)
    weights_N = torch.linspace(-1, 1, len(s_N), dtype=s_N.dtype)
    return (s_N * weights_N).mean() + (s_N[1:] - s_N[:-1]).tanh().sum() + s_N.square().mean()


def by_position_again(s_N: Tensor, rows: Sequence[Row]) -> Tensor:
    n = len(rows)
    found = sum(s_N[i] * (2 * i / (n - 1) - 1) for i in range(n)) / n
    found = found + sum(torch.tanh(s_N[i + 1] - s_N[i]) for i in range(n - 1))
    return found + sum(s**2 for s in s_N) / n


def in_two_terms(inputs: Any, batch: Any) -> dict[str, Tensor]:  # noqa: ARG001
    x_ND = F.normalize(inputs, dim=-1)
    distances_NN = (x_ND[:, None] - x_ND[None]).square().sum(-1)
    return {"uniformity": distances_NN.mul(-2).exp().mean().log(), "spread": 0.3 * x_ND.std(0).mean()}


def in_two_terms_again(x_ND: Tensor, rows: Sequence[Row]) -> Tensor:
    x_ND, n = x_ND / x_ND.norm(dim=1, keepdim=True), len(rows)
    similar = sum(torch.exp(-2 * ((x_ND[i] - x_ND[j]) ** 2).sum()) for i in range(n) for j in range(n))
    centred_ND = x_ND - x_ND.sum(0) / n
    return torch.log(similar / n**2) + 0.3 * ((centred_ND**2).sum(0) / (n - 1)).sqrt().mean()


def kto(scores: Any, batch: Any) -> Tensor:
    """Return a loss like KTO's, whose reference point is a statistic of all rows without a gradient."""
    s_N = scores.reshape(-1)
    point = s_N.mean().clamp(min=-0.2).detach()
    spread = s_N.detach().std()
    gain_N = torch.where(batch["good"] > 0, s_N - point, point - s_N) / (1 + spread)
    return (1 - gain_N.sigmoid()).mean()


def kto_again(s_N: Tensor, rows: Sequence[Row]) -> Tensor:
    values = [float(s) for s in s_N.detach()]
    mean = sum(values) / len(values)
    spread = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    signs = [1 if row["good"] else -1 for row in rows]
    gains = [sign * (s - max(mean, -0.2)) / (1 + spread) for sign, s in zip(signs, s_N, strict=True)]
    return sum(1 - 1 / (1 + torch.exp(-gain)) for gain in gains) / len(rows)


def correlation(outputs: Any, targets: Any) -> Tensor:
    """Return 1 minus Pearson's correlation."""
    x_N, y_N = outputs[:, 0] - outputs[:, 0].mean(), targets - targets.mean()
    return 1 - (x_N * y_N).sum() / (x_N.norm() * y_N.norm())


@dataclass(frozen=True)
class Case:
    """A loss over all rows of an update.

    Attributes:
        model: makes the model, in float64.
        rows: draws rows.
        arguments: the arguments of `test_fine_tuning` that define the loss, given the model.
        reference: the loss of rows in one batch, given the model.
    """

    model: Callable[[], nn.Module]
    rows: Callable[[int], list[Any]]
    arguments: Callable[[Any], dict[str, Any]]
    reference: Callable[[Any, Sequence[Any]], Tensor]

    def gradient(self, model: nn.Module, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Return the gradient of the loss of one batch."""
        model.train()
        return gradient_of(model, self.reference(model, rows))


def gradient_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of a loss by each trainable parameter that it depends on."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def padded(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return rows as a batch, with `attention_mask`, and lists padded on the right to the longest."""
    batch = {}
    for name in rows[0]:
        values = [torch.as_tensor(row[name]) for row in rows]
        if name.endswith("_ids"):
            width = max(map(len, values))
            values = [torch.cat([v, v.new_full((width - len(v),), PAD)]) for v in values]
        batch[name] = torch.stack(values)
    if "input_ids" in batch:
        batch["attention_mask"] = (batch["input_ids"] != PAD).long()
    return batch


def made(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return make().double()

    return made


def _scorer() -> nn.Module:
    return _spread(BertForSequenceClassification(BertConfig(**_BERT, num_labels=1)))


def encoder(dropout: float = 0.0) -> nn.Module:
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return _spread(BertModel(BertConfig(**(_BERT | rates)), add_pooling_layer=False))


def _spread(model: nn.Module, std: float = 0.2) -> nn.Module:
    """Draw larger weights, so that rows differ."""
    for name, weight in model.named_parameters():
        if name != "logit_scale":
            nn.init.normal_(weight, std=std)
    return model


def _clip() -> nn.Module:
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    size = {"text_config": {**_CLIP_SIZE, **text}}
    size["vision_config"] = {**_CLIP_SIZE, "image_size": 8, "patch_size": 4, "num_channels": 1}
    return _spread(CLIPModel(CLIPConfig(**size, projection_dim=8)), std=0.3)


def _ids(draw: torch.Generator, longest: int = 12) -> list[int]:
    length = int(torch.randint(3, longest + 1, (1,), generator=draw))
    return torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()


def _rows(columns: Callable[[torch.Generator, int], Any]) -> Callable[[int], list[Any]]:
    def rows(n: int = N_ROWS) -> list[Any]:
        draw = torch.Generator().manual_seed(3)
        return [columns(draw, number) for number in range(n)]

    return rows


def _number(draw: torch.Generator, below: int) -> int:
    return int(torch.randint(below, (1,), generator=draw))


def _pair(draw: torch.Generator, _: int) -> Row:
    return {"input_ids": _ids(draw), "answer_ids": _ids(draw, 8)}


def _image_and_text(draw: torch.Generator, _: int) -> Row:
    return {"input_ids": _ids(draw), "pixel_values": torch.randn(1, 8, 8, generator=draw, dtype=torch.float64)}


def _in_group(draw: torch.Generator, number: int) -> Row:
    return {"input_ids": _ids(draw), "group": _number(draw, 2), "grade": number % 5}


def _survival(draw: torch.Generator, number: int) -> Row:
    return {"input_ids": _ids(draw), "time": float(1 + _number(draw, 6)), "event": float(number % 4 != 1)}


def _judged(draw: torch.Generator, number: int) -> Row:
    return {"input_ids": _ids(draw), "good": number % 3}


def _text(draw: torch.Generator, _: int) -> Row:
    return {"input_ids": _ids(draw)}


def _point(draw: torch.Generator, _: int) -> tuple[Tensor, Tensor]:
    x_4 = torch.randn(4, generator=draw, dtype=torch.float64)
    return x_4, x_4[0] + torch.randn((), generator=draw, dtype=torch.float64)


def scores_of(outputs: Any, batch: Any) -> Tensor:  # noqa: ARG001
    return outputs.logits[:, 0]


def _scores(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    batch = padded(rows)
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]


def _scored(loss_fn: Any, again: Callable[[Tensor, Sequence[Row]], Tensor], columns: Any) -> Case:
    """Return a case of a loss over one score per row."""
    return Case(
        made(_scorer),
        _rows(columns),
        lambda _: {"loss_fn": loss_fn, "loss_inputs": scores_of},
        lambda model, rows: again(_scores(model, rows), rows),
    )


def _two_towers(model: Any, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    batch = padded(rows)
    found = model(batch["input_ids"], batch["answer_ids"])
    return found["questions"], found["answers"]


def pooled(outputs: Any, batch: Any) -> Tensor:
    mask_BL1 = batch["attention_mask"].unsqueeze(-1)
    return (outputs.last_hidden_state * mask_BL1).sum(1) / mask_BL1.sum(1)


def _pooled(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    batch = padded(rows)
    states_BLD = model(**batch).last_hidden_state
    return torch.stack([state[: len(row["input_ids"])].mean(0) for state, row in zip(states_BLD, rows, strict=True)])


def _both_embeddings(outputs: Any, batch: Any) -> dict[str, Tensor]:  # noqa: ARG001
    return {"image": outputs.image_embeds, "text": outputs.text_embeds}


def _of_clip(model: Any) -> dict[str, Any]:
    def loss(inputs: Any, batch: Any) -> Tensor:  # noqa: ARG001
        return info_nce(inputs["text"], inputs["image"], model.logit_scale)

    return {"loss_fn": loss, "loss_inputs": _both_embeddings}


def _with_temperature(model: Any) -> dict[str, Any]:
    def loss(inputs: Any, batch: Any) -> Tensor:  # noqa: ARG001
        return info_nce(inputs["questions"], inputs["answers"], model.log_scale)

    return {"loss_fn": loss, "data_collator": padded}


def _of_pairs(model: nn.Module, rows: Sequence[Any]) -> Tensor:
    inputs, targets = (torch.stack(column) for column in zip(*rows, strict=True))
    found = model(inputs)[:, 0]
    return 1 - torch.corrcoef(torch.stack([found, targets]))[0, 1]


class LossOfModel(nn.Module):
    """A loss that keeps the model as an attribute, as the losses of sentence-transformers do."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any, batch: Any) -> Tensor:  # noqa: ARG002
        return info_nce(inputs["questions"], inputs["answers"], self.model.log_scale)


CASES = {
    "bi-encoder, InfoNCE": Case(
        made(BiEncoder), _rows(_pair), _with_temperature,
        lambda model, rows: info_nce_again(*_two_towers(model, rows), model.log_scale),
    ),
    "CLIPModel": Case(
        made(_clip), _rows(_image_and_text), _of_clip,
        lambda model, rows: model(**padded(rows), return_loss=True).loss,
    ),
    "ranking in groups": _scored(ranking, ranking_again, _in_group),
    "Cox": _scored(cox, cox_again, _survival),
    "by position": _scored(by_position, by_position_again, _text),
    "two terms": Case(
        made(encoder), _rows(_text),
        lambda _: {"loss_fn": in_two_terms, "loss_inputs": pooled},
        lambda model, rows: in_two_terms_again(_pooled(model, rows), rows),
    ),
    "loss that holds the model": Case(
        made(BiEncoder), _rows(_pair), lambda model: {"loss_fn": LossOfModel(model), "data_collator": padded},
        lambda model, rows: info_nce_again(*_two_towers(model, rows), model.log_scale),
    ),
    "like KTO": _scored(kto, kto_again, _judged),
    "(inputs, targets)": Case(
        made(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))), _rows(_point),
        lambda _: {"loss_fn": correlation}, _of_pairs,
    ),
    "padding counts": Case(
        made(Averaging), _rows(_text), lambda _: {"loss_fn": in_two_terms, "loss_inputs": lambda outputs, _: outputs},
        lambda model, rows: in_two_terms_again(model(padded(rows)["input_ids"]), rows),
    ),
}  # fmt: skip
