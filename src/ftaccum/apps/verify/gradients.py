"""Gradients as they lie in `param.grad`: taken out, and compared."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class WindowGradient:
    """What a window led to.

    Attributes:
        gradient: by trainable parameter, in order; None where it took no part.
        loss: the mean over all loss items of the window.
    """

    gradient: Sequence[Tensor | None]
    loss: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(_norm(self.gradient))

    @property
    def is_an_update(self) -> bool:
        """Whether an optimizer can take it: the mean over no loss items has no gradient, or none that is finite."""
        return self.is_finite and _norm(self.gradient) > 0

    def gradient_error(self, wanted: "WindowGradient") -> float:
        """‖gradient - wanted‖ / ‖wanted‖; ‖gradient‖ where nothing is wanted."""
        off = _norm([_difference(f, w) for f, w in zip(self.gradient, wanted.gradient, strict=True)])
        return off / (_norm(wanted.gradient) or 1.0)

    def loss_error(self, wanted: "WindowGradient") -> float:
        return abs(self.loss - wanted.loss) / (abs(wanted.loss) or 1.0)

    def error(self, wanted: "WindowGradient") -> float:
        """The larger of the two."""
        return max(self.gradient_error(wanted), self.loss_error(wanted))


def taken(model: nn.Module, scale: float = 1.0) -> list[Tensor | None]:
    """The gradients of a model divided by `scale`, which are gone from it afterwards."""
    found = []
    for p in model.parameters():
        if p.requires_grad:
            found.append(None if p.grad is None else p.grad.div_(scale) if scale != 1 else p.grad)
        p.grad = None
    return found


def _difference(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one - other


def _norm(gradient: Sequence[Tensor | None]) -> float:
    # Each parameter's norm is exact enough in its own precision; 16 bits would overflow.
    norms = [
        torch.linalg.vector_norm(g.to(torch.promote_types(g.dtype, torch.float32))) for g in gradient if g is not None
    ]
    return sum(norm.item() ** 2 for norm in norms) ** 0.5
