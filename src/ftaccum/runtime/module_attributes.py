"""State that modules keep besides parameters and buffers: counters, averages, lists."""

import functools
import random
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .log import logger

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
OF_SHARDING = "__composable_api_state_key"  # prefix of the attributes of FSDP2, which keeps its own state
_BUDGET = 2**28  # most bytes of tensors and arrays to copy
_DEPTH = 3  # levels of containers and objects to look into
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# Objects not to look into: modules are visited one by one, and the others have no state or are restored elsewhere.
_WHOLE = (*GENERATORS, nn.Module, type, ModuleType, FunctionType, MethodType, functools.partial, torch.dtype)
# Where a module keeps its forward hooks, by id.
_HOOKS_AFTER = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_HOOKS_BEFORE = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
_HOOKS = (*_HOOKS_AFTER, *_HOOKS_BEFORE)
_HOOKS_ON_GRADIENTS = ("_backward_hooks", "_backward_pre_hooks")
ALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", *_HOOKS_ON_GRADIENTS)
_PLAIN = (int, float, str, bytes, type(None))  # items that contain no others


def has_hooks_before(module: nn.Module) -> bool:
    """Return whether hooks run before a module's forward pass, and so may change its inputs."""
    return any(vars(module)[name] for name in _HOOKS_BEFORE)


def has_hooks_after(module: nn.Module) -> bool:
    """Return whether hooks run after a module's forward pass, and so may read or change its outputs."""
    return any(vars(module)[name] for name in _HOOKS_AFTER)


def has_hooks_on_gradients(module: nn.Module) -> bool:
    """Return whether hooks run in a module's backward pass."""
    return any(vars(module)[name] for name in _HOOKS_ON_GRADIENTS)


def has_hooks(module: nn.Module) -> bool:
    """Return whether hooks run before or after a module's forward pass, or in its backward pass."""
    return has_hooks_before(module) or has_hooks_after(module) or has_hooks_on_gradients(module)


class ModuleAttributes:
    """A snapshot of the plain attributes of modules, which are neither parameters nor buffers, of hooks and submodules.

    Some models replace a submodule in a pass, and set an attribute that says so: BigBird, its attention, if rows are
    short. Some install forward hooks in their first pass and set an attribute that says so. If only the attribute were
    restored, they would install them again, and collect their hidden states twice.
    """

    def __init__(self, *modules: nn.Module) -> None:
        everything = dict.fromkeys(inner for module in modules for inner in module.modules())
        snapshots = _Snapshots()
        for module in everything:
            _settle_8bit_weights(module)
        self._kept = {
            module: {name: snapshots.keep(value) for name, value in _attributes(module)} for module in everything
        }
        self._submodules = {module: dict(vars(module)["_modules"]) for module in everything}
        self._hooks = {module: {name: set(vars(module)[name]) for name in _HOOKS} for module in everything}

    def changed(self) -> list[str]:
        """Return a description of each attribute that has changed since the snapshot."""
        return [
            f"`{name}` of {type(module).__name__}"
            for module, kept in self._kept.items()
            for name, value in _attributes(module)
            if name not in kept or not kept[name].holds(value)
        ]

    def restore(self) -> None:
        """Restore all attributes and replaced submodules; delete new attributes and new forward hooks.

        New submodules stay, because they may have weights. Warn about attributes that cannot be restored.
        """
        for module, submodules in self._submodules.items():
            vars(module)["_modules"].update(submodules)
        for module, hooks in self._hooks.items():
            for name, known in hooks.items():
                for new in vars(module)[name].keys() - known:
                    del vars(module)[name][new]
        for module, kept in self._kept.items():
            for name, _ in _attributes(module):
                if name not in kept:
                    del vars(module)[name]
            for name, value in kept.items():
                vars(module)[name] = value.restored()
        for place in self.changed():
            _warn_if_lost(place)

    def hold_generators(self) -> bool:
        """Return whether any attribute is a random number generator."""
        return any(isinstance(value.value, GENERATORS) for kept in self._kept.values() for value in kept.values())


def _settle_8bit_weights(module: Any) -> None:
    """Do what the first forward pass of an 8-bit layer of bitsandbytes does: move scales from the weight to its state.

    The move cannot be undone. If only the state were restored, the layer would quantize its 8-bit weights again.
    """
    if getattr(module, "init_8bit_state", None) is not None and getattr(module.weight, "CB", None) is not None:
        module.init_8bit_state()


@functools.cache
def _warn_if_lost(place: str) -> None:
    logger.warning(
        f"{place} changes in the forward passes of ftaccum's checks and cannot be restored afterwards: it is too large "
        "to copy, or contains objects that cannot be copied. Make it a buffer (`register_buffer`)."
    )


@contextmanager
def preserve_attributes(*modules: nn.Module) -> Iterator[None]:
    """Restore the plain attributes of modules on exit."""
    before = ModuleAttributes(*modules)
    try:
        yield
    finally:
        before.restore()


@contextmanager
def preserve_object(owner: Any, without: Collection[str]) -> Iterator[None]:
    """Restore the attributes of an object that is no module on exit, in place, and delete new ones.

    Args:
        without: names of attributes that are not looked at.
    """
    snapshots = _Snapshots()
    kept = {name: snapshots.keep(value) for name, value in vars(owner).items() if name not in without}
    try:
        yield
    finally:
        for name in vars(owner).keys() - kept.keys() - set(without):
            delattr(owner, name)
        for name, snapshot in kept.items():
            vars(owner)[name] = snapshot.restored()


class _Snapshots:
    """A store of copied values, with one copy of an object that several modules share."""

    def __init__(self) -> None:
        self.bytes_left = _BUDGET
        self._known: dict[tuple[int, int], _Snapshot] = {}

    def keep(self, value: Any, depth: int = _DEPTH) -> "_Snapshot":
        key = id(value), 0 if isinstance(value, Tensor | np.ndarray) else depth
        if key not in self._known:
            self._known[key] = _Snapshot(value, self, depth)
        return self._known[key]


class _Snapshot:
    """One value and a copy of its mutable content, as far as the byte budget and the depth allow."""

    def __init__(self, value: Any, snapshots: _Snapshots, depth: int) -> None:
        self.value = value
        self._version = value._version if isinstance(value, Tensor) and not value.is_inference() else 0
        self._copy: Any = None
        self._inner: list[_Snapshot] = []
        if isinstance(value, Tensor | np.ndarray):
            n_bytes = value.numel() * value.element_size() if isinstance(value, Tensor) else value.nbytes
            if n_bytes <= snapshots.bytes_left:
                snapshots.bytes_left -= n_bytes
                self._copy = value.detach().clone() if isinstance(value, Tensor) else value.copy()
        elif depth and (items := _items_of(value)) is not None:
            self._copy = dict(items) if isinstance(items, dict) else set(items) if isinstance(items, set) else [*items]
            inner = items.values() if isinstance(items, dict) else items
            self._inner = [snapshots.keep(item, depth - 1) for item in inner if not isinstance(item, _PLAIN)]

    def holds(self, value: Any) -> bool:
        """Return whether `value` is the kept one and has not changed."""
        if value is not self.value:
            return _same(value, self.value)
        if isinstance(value, Tensor):
            written = not value.is_inference() and value._version != self._version
            return not written or (self._copy is not None and torch.equal(value, self._copy))
        if self._copy is None:
            return True
        if isinstance(value, np.ndarray):
            return value.tobytes() == self._copy.tobytes()
        return _same_items(_items_of(value), self._copy) and all(kept.holds(kept.value) for kept in self._inner)

    def restored(self) -> Any:
        """Restore the value in place and return it.

        A tensor that was too large to copy stays changed, and `holds` still returns False for it.
        """
        value, copy = self.value, self._copy
        if copy is None or self.holds(value):
            return value
        if isinstance(value, Tensor):
            with torch.no_grad():
                value.copy_(copy)
        elif isinstance(value, np.ndarray):
            value[...] = copy
        else:
            _fill(_items_of(value), copy)
            for kept in self._inner:
                kept.restored()
        return value


def _items_of(value: Any) -> Any:
    """Return a container itself, the attribute dict of a plain object, or None for anything else."""
    if isinstance(value, dict | list | tuple | deque | set):
        return value
    return None if isinstance(value, _WHOLE) else getattr(value, "__dict__", None)


def _fill(items: Any, copy: Any) -> None:
    """Restore items in place. In subclasses of dict, bypass methods that the user has overridden."""
    if isinstance(items, tuple) or _same_items(items, copy):
        return
    if isinstance(items, dict):
        kind: Any = OrderedDict if isinstance(items, OrderedDict) else dict
        kind.clear(items)
        for key, item in copy.items():
            kind.__setitem__(items, key, item)
    else:
        items.clear()
        (items.update if isinstance(items, set) else items.extend)(copy)


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for name, value in vars(module).items()
        if name not in OF_EVERY_MODULE and not name.startswith(OF_SHARDING)
    ]


def _same_items(one: Any, other: Any) -> bool:
    if isinstance(one, set):
        return one == other
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return len(one) == len(other) and all(map(_same, one, other))


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, bool | int | float | str) and one == other)
