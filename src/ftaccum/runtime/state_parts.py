"""Parts of the state that a loss reads, and whether they have changed."""

from collections.abc import Callable, Collection
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

SCALARS = (bool, int, float, complex, str, bytes, type(None))
_SMALL = 4096  # elements; smaller tensors and arrays in the host's memory are compared by their values
_ACTIVATION = object()  # stands for a tensor that a pass has computed with gradients, so that it is not kept


class Items:
    """The items of a container, the attributes of an object, or the values that a function refers to."""

    def __init__(self, place: str, item: str, read: Callable[[], Any], ignored: Collection[str] = ()) -> None:
        """Args:
        item: a format that makes the name of an item from its key, after the place.
        read: returns the items now, as a dict, list, tuple or set.
        ignored: the keys of items that do not count.
        """
        self.place = place
        self._item, self._read, self._ignored = item, read, ignored
        self.renew()

    def renew(self) -> None:
        """Compare with the present items from now on."""
        items = self._read()
        self._is_set = isinstance(items, set | frozenset)
        self._keys = list(items) if isinstance(items, dict) else []
        values = items.values() if isinstance(items, dict) else items
        self._values: Any = set(items) if self._is_set else [*map(_kept, values)]

    def changed(self) -> list[str]:
        """Return the names of the items that have changed."""
        items, before = self._read(), self._values
        if self._is_set:
            return [] if items == before else [self.place]
        values = [*items.values()] if isinstance(items, dict) else [*items]
        try:
            if values == before:  # fast, because equality starts with identity
                return []
        except Exception:  # two tensors or arrays are neither equal nor unequal
            pass
        if not isinstance(items, dict):
            same = len(values) == len(before) and all(map(_same, values, before))
            return [] if same else [self.place]
        known = dict(zip(self._keys, before, strict=True))
        return [
            self.place + self._item.format(key)
            for key in {**known, **items}
            if key not in self._ignored and not (key in known and key in items and _same(items[key], known[key]))
        ]


class Values:
    """The values of a tensor or an array."""

    def __init__(self, place: str, value: Any) -> None:
        self.place, self._value = place, value
        self.renew()

    def renew(self) -> None:
        """Compare with the present values from now on."""
        value = self._value
        self._copy: Any = None
        if isinstance(value, np.ndarray) and value.size <= _SMALL:
            self._copy = value.copy()
        elif isinstance(value, Tensor) and _is_small(value):
            self._copy = value.detach().clone()
        self._version = _version(value)

    def changed(self) -> list[str]:
        """Return the place if the values have changed, and are not those of a weight that is trained."""
        if isinstance(self._value, Tensor) and self._value.requires_grad:
            return []
        if self._copy is None:
            same = _version(self._value) == self._version
        elif isinstance(self._value, Tensor):
            same = torch.equal(self._value, self._copy)
        else:
            same = self._value.tobytes() == self._copy.tobytes()
        return [] if same else [self.place]


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _is_small(tensor: Tensor) -> bool:
    is_here = tensor.device.type == "cpu" and tensor.layout is torch.strided
    return is_here and tensor.numel() <= _SMALL


def _kept(value: Any) -> Any:
    return _ACTIVATION if _is_activation(value) else value


def _same(one: Any, other: Any) -> bool:
    if one is other or (_is_activation(one) and other is _ACTIVATION):
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        both = _is_small(one) and _is_small(other) and one.dtype == other.dtype
        return both and torch.equal(one, other)
    if isinstance(one, SCALARS) and isinstance(other, SCALARS):
        return one == other or (one != one and other != other)
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, MethodType | torch.dtype | torch.device) and one == other


def _is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None
