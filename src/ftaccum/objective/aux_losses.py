"""What a loss is the sum of, read off the graph that it was computed by."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def has_parts(outputs: Any, loss: str) -> bool:
    """Whether there are scalars among a model's outputs beside the loss."""
    return isinstance(outputs, Mapping) and any(_is_scalar(value) for name, value in outputs.items() if name != loss)


def factors_of(outputs: Any, loss: str) -> dict[str, float]:
    """The scalar outputs that a model's loss has added to it, with their factors: ∂ loss / ∂ output.

    A factor that is no constant (one that is learnt, or depends on the batch) is NaN. Where one such output was
    computed from another, the other stands for both. No parameter gets a gradient.

    Args:
        outputs: as the model gave them, computed with gradients.
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
    # The slope's own graph tells whether it is a constant.
    found = torch.autograd.grad(of, by, create_graph=True, allow_unused=True) if by else ()
    return [0.0 if slope is None else math.nan if slope.requires_grad else slope.item() for slope in found]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point()
