"""Summaries of gradients that allow comparing two gradients without a copy of either."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..runtime.gradient_hooks import suspend_gradient_hooks
from ..runtime.state_guards import preserve_gradients
from .normalizer import widest_float
from .signed_sums import add_signed

_SUMS = 1024  # per parameter


@dataclass
class GradientSketch:
    """A gradient reduced to 1,024 sums per parameter.

    The numbers of a parameter's gradient get random signs and are summed (`signed_sums`). Sketching is linear: the
    difference of two sketches is the sketch of the difference, and the expected square of its norm is that of the
    difference itself. The estimated norm has a relative standard error of at most 1 / sqrt(2 · 1,024) = 2.2%;
    parameters of up to 1,024 numbers are exact.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, gradient: Tensor) -> None:
        """Add to the gradient of one parameter."""
        sums = torch.zeros(_SUMS, dtype=widest_float(gradient.device), device=gradient.device)
        add_signed(sums, gradient)
        self.sums[name] = self.sums.get(name, 0) + sums.double().cpu()

    def norms(self) -> dict[str, float]:
        """Return the estimated norm of the gradient, by parameter."""
        return {name: sums.norm().item() for name, sums in self.sums.items()}

    def minus(self, other: "GradientSketch") -> "GradientSketch":
        """Return the sketch of the difference; a parameter that one of them lacks has a gradient of 0 there."""
        names = dict.fromkeys((*self.sums, *other.sums))
        none = torch.zeros((), dtype=torch.float64)
        return GradientSketch({name: self.sums.get(name, none) - other.sums.get(name, none) for name in names})

    def norm(self) -> float:
        """Return the estimated norm over all parameters."""
        return math.hypot(*self.norms().values())


@contextmanager
def sketch_gradients(model: nn.Module) -> Iterator[GradientSketch]:
    """Sketch the gradients of backward passes as they come without keeping them, and restore `grad` afterwards."""
    sketch = GradientSketch()

    def sketch_and_drop(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None, "the hook runs after the gradient is accumulated"
        sketch.add(name, parameter.grad)
        parameter.grad = None

    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with preserve_gradients(model), suspend_gradient_hooks(model):
        handles = [
            p.register_post_accumulate_grad_hook(lambda p, name=name: sketch_and_drop(name, p)) for name, p in trained
        ]
        try:
            yield sketch
        finally:
            for handle in handles:
                handle.remove()
