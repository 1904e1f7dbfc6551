"""Support for optimizers that evaluate a window again in `step`, such as LBFGS and SAM."""

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


@dataclass(frozen=True)
class ClippedGradient:
    """A window's gradient as it was before clipping, in numbers.

    Attributes:
        losses: each pass's part of the window's loss.
        suspects: passes of this process whose loss is not finite.
        of_loss: whether any process has such a pass.
        moved_buffers: for each large buffer that no window had changed before, whether this one did, on any process.
    """

    norm: float
    n_items: float
    losses: list[float]
    suspects: list[MicroBatch]
    of_loss: bool
    moved_buffers: list[bool]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.norm) and not self.of_loss


class NonFiniteStepError(Exception):
    """Ends the step of an optimizer that asked for a loss or a gradient which is not finite."""

    def __init__(self, gradient: ClippedGradient) -> None:
        super().__init__()
        self.gradient = gradient


def closure_of(evaluate: Callable[[], ClippedGradient], total: Callable[[float], float]) -> Callable[[], Tensor]:
    """Return the closure to call `step` with.

    Args:
        evaluate: leaves the window's gradient at the present weights where the optimizer looks for it.
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
    """Return whether an optimizer, or one that it passes its closure on to, steps with a closure only."""
    return _takes_closure(optimizer) and any(map(_requires_closure, (optimizer, *inner_optimizers(optimizer))))


def check_step(optimizer: Optimizer, *, scales_gradients: bool) -> None:
    """Raise SettingsError where the loop cannot call an optimizer's `step`.

    Args:
        scales_gradients: whether a gradient scaler is at work (fp16).
    """
    kind, faults = type(optimizer).__name__, []
    required = [p.name for p in _parameters(optimizer) if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if set(required) - {"closure"}:
        faults.append(
            f"`step` of {kind} requires {', '.join(map(repr, required))}, but is called with a `closure` or with "
            "nothing. Have it take `closure`, a function that computes the gradient again and returns the loss."
        )
    elif _steps_twice(optimizer) and not _takes_closure(optimizer):
        faults.append(
            f"{kind} takes two steps an update (`first_step`, `second_step`), but its `step` takes no `closure`. "
            "Give it a `step(closure)` that calls them, with `closure()` in between."
        )
    elif needs_closure(optimizer) and scales_gradients:
        faults.append(
            f"{kind} steps with a closure, which the gradient scaler of `mixed_precision='fp16'` cannot pass on. "
            "Use 'bf16' or 'no'."
        )
    refuse(faults)


def _requires_closure(optimizer: Optimizer) -> bool:
    closures = [p for p in _parameters(optimizer) if p.name == "closure"]
    return _steps_twice(optimizer) or any(p.default is p.empty for p in closures)


def _takes_closure(optimizer: Optimizer) -> bool:
    return any(p.name == "closure" for p in _parameters(optimizer))


def _steps_twice(optimizer: Optimizer) -> bool:
    """Return whether it is a SAM as it is often written: `step(closure=None)` fails without."""
    return all(hasattr(optimizer, name) for name in ("first_step", "second_step"))


def _parameters(optimizer: Optimizer) -> list[inspect.Parameter]:
    return list(inspect.signature(type(optimizer).step).parameters.values())[1:]
