"""Copy state to the host, measure and compare it, and check that it can be loaded without running code."""

import io
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..runtime.sharding.tensors import local_part


def map_tensors(value: Any, function: Callable[[Tensor, str], Any], path: str = "") -> Any:
    """Return a nested value with the result of `function` in place of each tensor.

    Args:
        function: called with a tensor and its path, such as "state/0/exp_avg".
        path: the path of the value itself.
    """
    if isinstance(value, Tensor):
        return function(value, path)
    inner = f"{path}/" if path else ""
    if isinstance(value, Mapping):
        return {key: map_tensors(item, function, f"{inner}{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [map_tensors(item, function, f"{inner}{index}") for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def on_host(value: Any, copy: bool) -> Any:
    """Return a nested value with its tensors in host memory; with `copy`, always as copies."""
    return map_tensors(value, lambda tensor, _: tensor.detach().to("cpu", copy=copy).contiguous())


def n_bytes_in(value: Any) -> int:
    """Return the total bytes of all tensors in a nested value; of sharded ones, those of this process's part."""
    if isinstance(value, Tensor):
        return local_part(value).numel() * value.element_size()
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(n_bytes_in, items))


def holds_same(one: Any, other: Any) -> bool:
    """Return whether two nested values are equal; their tensors must have equal types and numbers."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(holds_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(holds_same, one, other))
    return type(one) is type(other) and bool(one == other)


def unreadable(value: Any) -> str | None:
    """Return the type name of the first item in a nested value that cannot be loaded without running code, or None."""
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
    except Exception:  # pickling may raise anything
        return False
    return True
