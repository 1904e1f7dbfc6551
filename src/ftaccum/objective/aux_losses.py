"""The outputs that a model adds up to its loss, read off the autograd graph."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def has_parts(outputs: Any, loss: str) -> bool:
    """Return whether a model's outputs hold scalars besides the loss."""
    return isinstance(outputs, Mapping) and any(_is_scalar(value) for name, value in outputs.items() if name != loss)


def factors_of(outputs: Any, loss: str) -> dict[str, float]:
    """Return the scalar outputs that a model's loss adds up, with their factors: ∂ loss / ∂ output.

    A factor that is not constant, because it is learned or depends on the batch, is NaN. If one output was computed
    from another, only the other is returned. No parameter gets a gradient.

    Args:
        outputs: the model's outputs, computed with gradients.
        loss: the name of the loss among them.
    """
    if not outputs[loss].requires_grad:
        return {}
    scalars = {name: value for name, value in outputs.items() if _is_scalar(value) and value.requires_grad}
    names = list({id(value): name for name, value in scalars.items() if value is not outputs[loss]}.values())
    parts = [outputs[name] for name in names]
    leaves = [n for n, part in enumerate(parts) if not any(_slopes(part, [p for p in parts if p is not part]))]
    slopes = _slopes(outputs[loss], [parts[n] for n in leaves])
    return {names[n]: slope for n, slope in zip(leaves, slopes, strict=True) if slope}


def _slopes(of: Tensor, by: list[Tensor]) -> list[float]:
    # A slope that has a graph of its own is not a constant.
    found = torch.autograd.grad(of, by, create_graph=True, allow_unused=True) if by else ()
    return [0.0 if slope is None else math.nan if slope.requires_grad else slope.item() for slope in found]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point()
