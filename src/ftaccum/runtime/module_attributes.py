"""What modules keep besides parameters and buffers: counters, averages, lists."""

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_SMALL = 65536  # numbers of a tensor up to which a copy is kept
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


class ModuleAttributes:
    """The plain attributes of modules at one time."""

    def __init__(self, *modules: nn.Module) -> None:
        everything = dict.fromkeys(inner for module in modules for inner in module.modules())
        self._kept = {module: {name: _Kept(value) for name, value in _attributes(module)} for module in everything}

    def changed(self) -> list[str]:
        """Return what to call the attributes that have other values by now."""
        return [
            f"`{name}` of {type(module).__name__}"
            for module, kept in self._kept.items()
            for name, value in _attributes(module)
            if name not in kept or not kept[name].holds(value)
        ]

    def restore(self) -> None:
        """Put all attributes back, and remove those that are new."""
        for module, kept in self._kept.items():
            for name, _ in _attributes(module):
                if name not in kept:
                    del vars(module)[name]
            for name, value in kept.items():
                vars(module)[name] = value.restored()

    def hold_generators(self) -> bool:
        """Return whether one of them draws at random."""
        return any(isinstance(value.value, _GENERATORS) for kept in self._kept.values() for value in kept.values())


@contextmanager
def preserve_attributes(*modules: nn.Module) -> Iterator[None]:
    """Leave the plain attributes of modules as they were."""
    before = ModuleAttributes(*modules)
    try:
        yield
    finally:
        before.restore()


class _Kept:
    """One value, with a copy of what it holds where that may change."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._version = value._version if isinstance(value, Tensor) and not value.is_inference() else 0
        self._copy: Any = None
        if isinstance(value, Tensor):
            self._copy = value.detach().clone() if value.numel() <= _SMALL else None
        elif type(value) in (list, dict, set, deque):
            self._copy = value.copy()

    def holds(self, value: Any) -> bool:
        """Return whether a value is this one, unchanged."""
        if isinstance(value, Tensor):
            written = not value.is_inference() and value._version != self._version
            return value is self.value and not (written and (self._copy is None or not torch.equal(value, self._copy)))
        if self._copy is not None and value is self.value:
            return _same_items(value, self._copy)
        return value is self.value or (isinstance(value, bool | int | float | str) and value == self.value)

    def restored(self) -> Any:
        """Return the value as it was."""
        if self._copy is None or self.holds(self.value):
            return self.value
        if isinstance(self.value, Tensor):
            with torch.no_grad():
                self.value.copy_(self._copy)
            return self.value
        self.value.clear()
        (self.value.update if isinstance(self.value, dict | set) else self.value.extend)(self._copy)
        return self.value


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(module).items() if name not in _OF_EVERY_MODULE]


def _same_items(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(value is other[key] for key, value in one.items())
    if isinstance(one, set):
        return one == other
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
