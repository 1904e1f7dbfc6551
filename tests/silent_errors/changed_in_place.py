"""Batches that `forward` or `loss_fn` change in place."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from .case import case, update_error

PAD, N_ROWS, VOCABULARY = 0, 8, 13


def _texts() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    lengths = [2, 7, 3, 5, 2, 6, 4, 7]
    ids = [torch.randint(1, VOCABULARY, (n,), generator=draw).tolist() for n in lengths]
    return [{"input_ids": row, "labels": row[::-1][:4] + [PAD] * (7 - len(row[:4]))} for row in ids]


def _batch(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    padded = [row["input_ids"] + [PAD] * (width - len(row["input_ids"])) for row in rows]
    ids = torch.tensor(padded)
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "labels": torch.tensor([r["labels"] for r in rows]),
    }


class _T5(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.t5 = T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.0,
                pad_token_id=PAD, decoder_start_token_id=PAD,
            )
        ).double()  # fmt: skip

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        labels[labels == PAD] = -100
        return self.t5(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


@case(1, "a wrapper around T5 sets padded labels to -100 in `forward`")
def wrapper_around_t5() -> float:
    rows = _texts()
    return update_error(_T5(), rows, lambda model: model(**_batch(rows)).loss, N_ROWS)


class _Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY)
        self.double()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids).tanh())


def _ignoring_padding(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    labels = batch["labels"]
    labels[labels == PAD] = -100
    return F.cross_entropy(outputs.flatten(0, 1), labels.flatten())


def _of_all(rows: list[dict[str, Any]], loss_fn: Any) -> Any:
    def loss(model: nn.Module) -> Tensor:
        batch = _batch(rows)
        return loss_fn(model(batch["input_ids"]), batch)

    return loss


def _padded_by_the_user() -> list[dict[str, Any]]:
    return [{**row, "input_ids": row["input_ids"] + [PAD] * (7 - len(row["input_ids"]))} for row in _texts()]


def _equally_long() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(1, VOCABULARY, (60, 5), generator=draw).tolist()
    return [{"input_ids": row, "labels": list(row)} for row in rows]


@case(1, "`loss_fn` sets padded labels to -100")
def loss_fn_ignores_padding() -> float:
    rows = _padded_by_the_user()
    return update_error(_Tagger(), rows, _of_all(rows, _ignoring_padding), N_ROWS, loss_fn=_ignoring_padding)


@case(1, "`loss_fn` sets padded labels to -100, in two rows of 60")
def loss_fn_ignores_rare_padding() -> float:
    rows = _equally_long()
    rows[17]["labels"][2:] = rows[41]["labels"][1:] = []
    for n in (17, 41):
        rows[n]["labels"] += [PAD] * (5 - len(rows[n]["labels"]))
    return update_error(_Tagger(), rows, _of_all(rows, _ignoring_padding), len(rows), loss_fn=_ignoring_padding)


@case(1, "the same with labels that are -100 already, which changes nothing", refused=None)
def loss_fn_that_changes_nothing() -> float:
    rows = _padded_by_the_user()
    for row in rows:
        row["labels"] = [-100 if label == PAD else label for label in row["labels"]]
    return update_error(_Tagger(), rows, _of_all(rows, _ignoring_padding), N_ROWS, loss_fn=_ignoring_padding)


@case(1, "`count_items` counts the labels that `loss_fn` leaves", refused=None)
def counted_by_the_user() -> float:
    rows = _padded_by_the_user()
    return update_error(
        _Tagger(), rows, _of_all(rows, _ignoring_padding), N_ROWS, loss_fn=_ignoring_padding,
        count_items=lambda batch: (batch["labels"] > PAD).sum(),
    )  # fmt: skip


def _shifting(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Compute the loss of targets that are numbered from 1."""
    batch["labels"].sub_(1)
    return F.cross_entropy(outputs, batch["labels"])


@case(1, "a collator hands over the user's own tensors, which `loss_fn` renumbers", refused=None)
def rows_are_the_users_own_tensors() -> float:
    draw = torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(1, 4, generator=draw).double(), "labels": torch.tensor([1 + n % 3])} for n in range(6)]
    x, labels = (torch.cat([row[name] for row in rows]) for name in ("x", "labels"))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    error = update_error(
        Net(), rows, lambda net: F.cross_entropy(net(x), labels - 1), 6, batch_size=1, loss_fn=_shifting,
        data_collator=lambda rows: rows[0] if len(rows) == 1 else {n: torch.cat([r[n] for r in rows]) for n in rows[0]},
    )  # fmt: skip
    return error + float((torch.cat([row["labels"] for row in rows]) != labels).sum())


def _popping(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), batch.pop("labels").flatten())


@case(1, "`loss_fn` takes the labels out of the batch", refused=None)
def labels_are_popped() -> float:
    rows = _equally_long()[:N_ROWS]
    return update_error(_Tagger(), rows, _of_all(rows, _popping), N_ROWS, loss_fn=_popping)
