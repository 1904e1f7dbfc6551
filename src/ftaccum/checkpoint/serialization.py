"""What can be kept on the host and on the disk, and read again without running anybody's code."""

import io
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def on_host(value: Any, copy: bool) -> Any:
    """The same with its tensors on the host; with `copy`, nobody else's."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=copy).contiguous()
    if isinstance(value, Mapping):
        return {key: on_host(item, copy) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [on_host(item, copy) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def n_bytes_in(value: Any) -> int:
    """Of all tensors in it."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(n_bytes_in, items))


def holds_same(one: Any, other: Any) -> bool:
    """Return whether two values are equal, with tensors of the same type and the same numbers."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(holds_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(holds_same, one, other))
    return type(one) is type(other) and bool(one == other)


def unreadable(value: Any) -> str | None:
    """The kind of the first thing in it that could not be read again without running code; None where all can be."""
    if value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str):
        return None
    if type(value) in (dict, OrderedDict):
        items = [*value.keys(), *value.values()]
    elif type(value) in (list, tuple):
        items = list(value)
    else:
        return None if _comes_back(value) else type(value).__qualname__
    return next((kind for item in items if (kind := unreadable(item))), None)


def _comes_back(value: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # whatever it raises when it is pickled
        return False
    return True
