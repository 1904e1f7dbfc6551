"""Runs on several processes, with whole and with sharded weights, which must end alike."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ftaccum import Result, test_fine_tuning
from heads import Row, all_in_float64, relative_error, unsharded

HISTORIES = ("loss_history", "grad_norm_history", "lr_history", "train_loss_history", "val_loss_history")
Trained = tuple[dict[str, Tensor], Result]


@dataclass(frozen=True)
class Case:
    """A model, its rows, and the arguments to train it with on several processes.

    Attributes:
        arguments: of the run with sharded weights, apart from `sharding` itself.
        alone: arguments of the run with whole weights alone.
        tolerance: the largest relative difference of weights and of the numbers in histories.
        of_audits: the largest error of the audits of the run with sharded weights, if it is not `tolerance`.
    """

    model: Callable[[], nn.Module]
    rows: Callable[[], list[Row]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    alone: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-12
    of_audits: float | None = None

    def trained(self, **arguments: Any) -> Trained:
        """Return the weights and the result of a run of two epochs: windows with a remainder, uneven evaluations."""
        return trained(self.model(), self.rows(), **self.arguments, **arguments)


def trained(model: nn.Module, rows: Sequence[Row], **arguments: Any) -> Trained:
    """Train a model on seven rows and evaluate it on five. Return whole weights, and the result.

    Args:
        arguments: of `test_fine_tuning`. `optimizer` may be a function of the model, marked by `of_model`.
    """
    sizes = {} if "effective_batch_size" in arguments else {"gradient_accumulation_steps": 2}
    given = {"train_data": rows[:7], "val_data": rows[4:9], "batch_size": 1, "n_epochs": 2, "audit": 2}
    common = {"learning_rate": 1e-3, "gradient_clip_norm": 0.5, "progress": False, "verbosity": "quiet"}
    if getattr(arguments.get("optimizer"), "of_model", False):
        arguments["optimizer"] = arguments["optimizer"](model)
    in_float64 = all(p.dtype == torch.float64 for p in model.parameters())
    with all_in_float64() if in_float64 else nullcontext():
        result = test_fine_tuning(model, **(given | common | sizes | arguments))
    return whole_weights(model), result


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's whole tensors, in float64. All processes must call this together."""
    return {name: unsharded(value).clone().double() for name, value in model.state_dict().items()}


def difference(found: Trained, wanted: Trained) -> float:
    """Return the largest relative difference of weights, histories and metrics. NaN counts if one of two has it."""
    differences = [relative_error(found[0], wanted[0])]
    pairs = [
        *((found[1][name], wanted[1][name]) for name in HISTORIES),
        *((list(a.values()), list(b.values())) for a, b in zip(found[1].metrics, wanted[1].metrics, strict=True)),
        ([found[1].final_loss, found[1].initial_loss], [wanted[1].final_loss, wanted[1].initial_loss]),
    ]
    for got, expected in pairs:
        differences += [_relative(a, b) for a, b in zip(got, expected, strict=True)]
    return max(differences)


def _relative(found: float, wanted: float) -> float:
    if math.isnan(found) and math.isnan(wanted):
        return 0.0
    off = abs(found - wanted) / max(abs(wanted), 1e-9)
    return math.inf if math.isnan(off) else off
