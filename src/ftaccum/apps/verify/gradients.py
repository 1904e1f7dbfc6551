"""Take gradients out of `param.grad`, and compare them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class WindowGradient:
    """The gradient and the loss of a window.

    Attributes:
        gradient: the gradient of each trainable parameter, in order; None for one that took no part.
        loss: the mean over all loss items of the window.
    """

    gradient: Sequence[Tensor | None]
    loss: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(_norm(self.gradient))

    @property
    def is_an_update(self) -> bool:
        """Whether an optimizer can use it. The mean over no loss items has no gradient, or one that is not finite."""
        return self.is_finite and _norm(self.gradient) > 0

    def gradient_error(self, wanted: "WindowGradient") -> float:
        """Return ‖gradient - wanted‖ / ‖wanted‖; ‖gradient‖ if the wanted gradient is zero."""
        off = _norm([_difference(f, w) for f, w in zip(self.gradient, wanted.gradient, strict=True)])
        return off / (_norm(wanted.gradient) or 1.0)

    def loss_error(self, wanted: "WindowGradient") -> float:
        return abs(self.loss - wanted.loss) / (abs(wanted.loss) or 1.0)

    def error(self, wanted: "WindowGradient") -> float:
        """Return the larger of the gradient error and the loss error."""
        return max(self.gradient_error(wanted), self.loss_error(wanted))


def taken(parameters: Iterable[nn.Parameter], scale: float = 1.0) -> list[Tensor | None]:
    """Remove the gradients from parameters, and return those of trainable ones divided by `scale`."""
    found = []
    for p in parameters:
        if p.requires_grad:
            found.append(None if p.grad is None else p.grad.div_(scale) if scale != 1 else p.grad)
        p.grad = None
    return found


def _difference(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one - other


def _norm(gradient: Sequence[Tensor | None]) -> float:
    # A parameter's own precision is accurate enough for its norm, but 16 bits could overflow.
    norms = [
        torch.linalg.vector_norm(g.to(torch.promote_types(g.dtype, torch.float32))) for g in gradient if g is not None
    ]
    return sum(norm.item() ** 2 for norm in norms) ** 0.5
