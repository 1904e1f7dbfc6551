"""Support for optimizers whose `step` evaluates a window again through a closure, such as LBFGS and SAM."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..data.loader import MicroBatch
from ..errors import refuse
from ..runtime.optimizers import inner_optimizers
from ..tracking.step import NoiseMeasurement


@dataclass(frozen=True)
class ClippedGradient:
    """Numbers that describe a window's gradient; the gradient itself has been clipped.

    Attributes:
        norm: the norm of the gradient before clipping.
        n_items: the window's loss items on all processes.
        losses: each micro-batch's part of the window's loss, on this process.
        suspects: the micro-batches of this process whose loss is not finite.
        of_loss: whether the loss of a micro-batch on any process is not finite.
        moved_buffers: for each large buffer that no earlier window had changed, whether this one did on any process.
        noise: how far the gradients of the halves of the window agree; None if it was not measured.
    """

    norm: float
    n_items: float
    losses: list[float]
    suspects: list[MicroBatch]
    of_loss: bool
    moved_buffers: list[bool]
    noise: NoiseMeasurement | None = None

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.norm) and not self.of_loss


class NonFiniteStepError(Exception):
    """Ends an optimizer's step because its closure computed a loss or a gradient that is not finite."""

    def __init__(self, gradient: ClippedGradient) -> None:
        super().__init__()
        self.gradient = gradient


def closure_of(evaluate: Callable[[], ClippedGradient], total: Callable[[float], float]) -> Callable[[], Tensor]:
    """Return the closure to call `step` with. It returns the window's loss on all processes.

    Args:
        evaluate: computes the window's gradient at the current weights, and leaves it where the optimizer reads it.
        total: sums a number over all processes.
    """

    @torch.enable_grad()
    def closure() -> Tensor:
        gradient = evaluate()
        if not gradient.is_finite:
            raise NonFiniteStepError(gradient)
        return torch.tensor(total(sum(gradient.losses)), dtype=torch.float64)

    return closure


def needs_closure(optimizer: Optimizer) -> bool:
    """Return whether an optimizer, or one that it holds and may pass its closure to, cannot step without a closure."""
    return _takes_closure(optimizer) and any(map(_requires_closure, (optimizer, *inner_optimizers(optimizer))))


def check_step(optimizer: Optimizer, *, scales_gradients: bool, is_sharded: bool = False) -> None:
    """Raise SettingsError if the training loop cannot call an optimizer's `step`.

    Args:
        scales_gradients: whether a gradient scaler is in use (fp16).
        is_sharded: whether the weights will be sharded.
    """
    kind, faults = type(optimizer).__name__, []
    required = [p.name for p in _parameters(optimizer) if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if set(required) - {"closure"}:
        faults.append(
            f"`step` of {kind} requires {', '.join(map(repr, required))}, but it is called with a `closure` or without "
            "arguments. Let it take `closure`, a function that computes the gradient again and returns the loss."
        )
    elif _steps_twice(optimizer) and not _takes_closure(optimizer):
        faults.append(
            f"{kind} takes two steps per update (`first_step`, `second_step`), but its `step` takes no `closure`. "
            "Give it a `step(closure)` that calls both, with `closure()` in between."
        )
    elif needs_closure(optimizer) and scales_gradients:
        faults.append(
            f"{kind} steps with a closure, which the gradient scaler of `mixed_precision='fp16'` does not support. "
            "Use 'bf16' or 'no'."
        )
    elif needs_closure(optimizer) and is_sharded:
        faults.append(
            f"The model is sharded, but {kind} steps with a closure, and such optimizers compute with all weights "
            "together. Use an optimizer such as 'adamw', or set `sharding='off'`."
        )
    refuse(faults)


def _requires_closure(optimizer: Optimizer) -> bool:
    closures = [p for p in _parameters(optimizer) if p.name == "closure"]
    return _steps_twice(optimizer) or any(p.default is p.empty for p in closures)


def _takes_closure(optimizer: Optimizer) -> bool:
    return any(p.name == "closure" for p in _parameters(optimizer))


def _steps_twice(optimizer: Optimizer) -> bool:
    """Return whether the optimizer looks like a common SAM, whose `step(closure=None)` fails without a closure."""
    return all(hasattr(optimizer, name) for name in ("first_step", "second_step"))


def _parameters(optimizer: Optimizer) -> list[inspect.Parameter]:
    return list(inspect.signature(type(optimizer).step).parameters.values())[1:]
