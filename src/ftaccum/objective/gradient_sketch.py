"""Summaries of gradients, by which two gradients can be compared without a copy of either."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..runtime.state_guards import preserve_gradients, suspend_gradient_hooks

_SUMS = 256  # a tensor


@dataclass
class GradientSketch:
    """For each parameter, 256 sums over the entries of its gradient, with random signs.

    Sketches are linear: the sketches of two gradients add up to that of their sum. The root of the squared sums
    estimates the norm to about 9% (√(1 / 2·256) of the square's spread), and is exact up to 256 entries.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, gradient: Tensor) -> None:
        """Add a gradient of one parameter."""
        sums = _signed_sums(gradient).double().cpu()
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums

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
    """Sketch the gradients of backward passes as they come, and keep none: `grad` is afterwards as it was."""
    sketch = GradientSketch()

    def sketch_and_drop(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None, "the hook comes after it was accumulated"
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


def _signed_sums(gradient: Tensor) -> Tensor:
    """Return the sums of a matrix's columns, with a random sign for each of its rows."""
    dense = gradient.detach().to_dense()
    entries = (torch.view_as_real(dense) if dense.is_complex() else dense).flatten()
    entries = entries.to(torch.promote_types(entries.dtype, torch.float32))
    n_whole = len(entries) // _SUMS
    draw = torch.Generator().manual_seed(len(entries))
    signs = (2 * torch.randint(0, 2, (n_whole,), generator=draw) - 1).to(entries)
    sums = signs @ entries[: n_whole * _SUMS].view(n_whole, _SUMS)
    rest = entries[n_whole * _SUMS :]
    return torch.cat([sums[: len(rest)] + rest, sums[len(rest) :]])
