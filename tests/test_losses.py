"""Losses of the user's own, of many kinds: the window's gradient is that of one batch in plain PyTorch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftaccum import test_fine_tuning
from heads import CLASSES, HEADS, RecordingOptimizer, one_batch, relative_error

WEIGHT = torch.tensor([1.0, 4.0, 0.25]).double()
TAGS = HEADS["token classification, BERT"]


def one_window(model: nn.Module, rows: Any, wanted: Tensor, **arguments: Any) -> float:
    """The relative gradient error of one window of all rows against `wanted`, the loss of one batch."""
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
