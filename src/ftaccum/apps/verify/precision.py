"""The precision of a measurement, and the errors that rounding may cause in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from ...objective.item_counts import Batch
from ...runtime.host import free_per_process
from ...runtime.state_guards import cast_tensors

# Bytes per weight to compare gradients in float64: a copy, one batch's gradient, the accumulated sum and its next term.
_PER_WEIGHT = 4 * 8
_LONGEST = 100  # characters


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the type of most of a model's weights."""
    sizes: dict[torch.dtype, int] = {}
    for p in model.parameters():
        if p.is_floating_point():
            sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
    return max(sizes, key=sizes.__getitem__, default=torch.float32)


def candidates(model: nn.Module, wanted: str | None, autocast: str) -> list[torch.dtype | None]:
    """Return the types to measure in, in the order in which to try them. None leaves the model unchanged."""
    if wanted is not None:
        return [None if wanted == "model" else getattr(torch, wanted)]
    if autocast != "no":
        return [None]  # autocast does not cast float64
    own = dtype_of(model)
    return [None if dtype == own else dtype for dtype in dict.fromkeys([torch.float64, torch.float32, own])]


@contextmanager
def measured_in(model: nn.Module, dtype: torch.dtype | None, *functions: Any) -> Iterator[None]:
    """Hold all weights and buffers of a model, and of functions that are modules, in one type. None changes nothing."""
    modules = [model, *(function for function in functions if isinstance(function, nn.Module))]
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    with cast_tensors(tensors if dtype is not None else [], dtype):
        yield


def cast(batch: Batch, dtype: torch.dtype | None) -> Batch:
    """Return a batch with its floating-point tensors converted to a type. None changes nothing."""
    if dtype is None or batch is None:
        return batch
    return recursively_apply(lambda t: t.to(dtype), batch, test_type=_is_floating)


def has_room(model: nn.Module, dtype: torch.dtype | None) -> bool:
    """Return whether a host is likely to have enough memory: running out kills the process without an error."""
    if dtype is None or next(model.parameters()).device.type != "cpu":
        return True
    needed = _PER_WEIGHT * sum(p.numel() for p in model.parameters()) * dtype.itemsize // torch.float64.itemsize
    return needed < free_per_process()


def shown(error: Exception) -> str:
    """Return the first line of an error of other code, shortened."""
    words = f"{type(error).__name__}: {error}".splitlines()[0]
    return words if len(words) <= _LONGEST else words[:_LONGEST] + " …"


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
