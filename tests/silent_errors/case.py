"""A case, the registry of all cases, and the comparison of one update with one batch in plain PyTorch."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ftaccum import test_fine_tuning


@dataclass(frozen=True)
class Case:
    """One use and its expected result.

    Attributes:
        kind: number of the kind in the table.
        name: what the user does, in a few words.
        run: returns the relative error of the result.
        refused: a part of the message that refuses it; None if it must be exact.
        tolerance: largest error that counts as exact.
        slow: whether only `scripts/test --all` runs it, because another case has the same cause.
    """

    kind: int
    name: str
    run: Callable[[], float]
    refused: str | None
    tolerance: float
    slow: bool = False


CASES: list[Case] = []

# For models that count their forward passes. Versions without audits have no such argument.
WITHOUT_AUDITS: dict[str, Any] = {"audit": False} if "audit" in signature(test_fine_tuning).parameters else {}


def case(
    kind: int, name: str, *, refused: str | None = None, tolerance: float = 1e-9, slow: bool = False
) -> Callable[[Callable[[], float]], Callable[[], float]]:
    """Register a function as a case."""

    def register(run: Callable[[], float]) -> Callable[[], float]:
        CASES.append(Case(kind, name, run, refused, tolerance, slow))
        return run

    return register


def update_error(
    model: nn.Module, train_data: Any, loss_of_all: Callable[[nn.Module], Tensor], n_rows: int, **arguments: Any
) -> float:
    """Return the relative error of one update of all rows against a step with the gradient of one batch.

    Args:
        model: trained in place by SGD with a learning rate of 1, so that its weights change by the gradient.
        loss_of_all: returns the loss of one batch of all rows, written without ftaccum. It gets a copy of the model, in
            train mode.
        n_rows: rows of an update.
        arguments: of `test_fine_tuning`. By default, micro-batches have two rows.
    """
    reference = copy.deepcopy(model).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss_of_all(reference).backward()
    test_fine_tuning(
        model,
        train_data=train_data,
        **{
            "batch_size": 2,
            "effective_batch_size": n_rows,
            "n_epochs": 1,
            "validation_split": 0.0,
            "optimizer": lambda groups: torch.optim.SGD(groups),
            "learning_rate": 1.0,
            "lr_scheduler": "constant",
            "weight_decay": 0.0,
            "gradient_clip_norm": None,
            "on_inexact": "error",
            "progress": False,
        }
        | arguments,
    )
    off, size = 0.0, 0.0
    for name, wanted in reference.named_parameters():
        moved = before[name] - dict(model.named_parameters())[name].detach()
        gradient = torch.zeros_like(moved) if wanted.grad is None else wanted.grad
        off += float((moved - gradient).square().sum())
        size += float(gradient.square().sum())
    return (off / size) ** 0.5
