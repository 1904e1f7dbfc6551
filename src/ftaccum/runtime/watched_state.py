"""State that a loss reads besides its inputs and weights, watched from one update to the next."""

import functools
import itertools
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .gradient_hooks import n_hooks
from .module_attributes import ALL_HOOKS, GENERATORS, OF_EVERY_MODULE, OF_SHARDING
from .state_parts import SCALARS, Items, Values

_DEPTH = 4  # levels of containers, objects and functions to look into
_MOST_ITEMS = 1000  # of a container; only the length of a larger one is watched
_MOST_PARTS = 20_000  # containers, objects and tensors to watch in all
_FEW = 3  # changes of a place that are rare; one that changes more often is a counter
_AUDITS = 3  # after a change
# Attributes that evaluations change and restore, or that heads infer from the labels of their first pass.
_IGNORED = ("training", "problem_type")
_OPAQUE = (*SCALARS, *GENERATORS, type, ModuleType, nn.Parameter)  # not to look into
# Functions and plain objects of these packages keep no state of a loss.
_LIBRARIES = {"torch", "numpy", "accelerate", "datasets", "pandas", "pyarrow", "tokenizers", *sys.stdlib_module_names}
_NAMESPACES = {"types", "argparse", "collections"}  # whose objects hold the user's values

Roots = Callable[[], Mapping[str, Any]]
_Part = Items | Values


class WatchedState:
    """Finds out whether the state of a loss has changed, other than trained weights and the statistics of norms.

    The state is what functions, modules and other objects refer to: plain attributes, buffers, frozen weights,
    submodules and the number of hooks, values of closures and defaults, and globals that a function names.

    Tensors of up to 4,096 numbers in the host's memory are compared by value, others by their version: to read them
    would wait for the device. Writes to `.data` do not change the version.

    A change counts until three audits: the rows of one may all have the same label, and then not show it.
    """

    def __init__(self, model: nn.Module, roots: Roots) -> None:
        """Args:
        model: the model, not wrapped.
        roots: returns the functions, modules and other objects that compute the loss, by name.
        """
        self._model, self._roots = model, roots
        self._times: Counter[str] = Counter()
        self._audits_left: dict[str, int] = {}  # of the places that have changed
        self._moved: set[str] | None = None  # the places of buffers that passes move; None before the first window
        self.renew()

    def look(self) -> bool:
        """Return whether the state has changed since the last call."""
        moved = self._moved or ()
        changed = {p: places for p in self._parts if (places := [each for each in p.changed() if each not in moved])}
        found = dict.fromkeys(itertools.chain.from_iterable(changed.values()))
        self._times.update(found.keys())
        self._audits_left |= dict.fromkeys(found, _AUDITS)
        if all(self._times[place] > _FEW + 1 for place in found):
            for part in changed:  # nothing inside them is watched
                part.renew()
        else:
            self.renew()
        return bool(found)

    def passed(self) -> None:
        """Leave out the buffers that the passes of the first window have moved. Call this after each window."""
        if self._moved is None:
            buffers = {f"model.{name}" for name, _ in self._model.named_buffers()}
            self._moved = buffers & {place for part in self._parts for place in part.changed()}

    @property
    def places(self) -> list[str]:
        """Where the state has changed lately, as messages name it."""
        return list(self._audits_left)

    @property
    def is_rare_change(self) -> bool:
        """Whether one of these places has rarely changed before."""
        return any(self._times[place] <= _FEW for place in self.places)

    def audited(self) -> None:
        """Record that the rows of an update were audited."""
        self._audits_left = {place: left - 1 for place, left in self._audits_left.items() if left > 1}

    def renew(self) -> None:
        """Compare with the present state from now on."""
        counters = {place for place, times in self._times.items() if times > _FEW}
        parts = _Walk(self._model, counters).parts(self._roots)
        self._parts = list(itertools.islice(parts, _MOST_PARTS))


class _Walk:
    """Finds the parts of a state, each once."""

    def __init__(self, model: nn.Module, counters: Collection[str]) -> None:
        """Args:
        counters: the places whose values change often, not to look into.
        """
        self._model, self._counters = model, counters
        self._known: dict[int, Any] = {}  # by id, which holds as long as the value is kept

    def parts(self, roots: Roots) -> Iterator[_Part]:
        yield Items("", "{}", roots)
        yield Items("", "the hooks of {}", _reader_of_hooks(self._model))
        for name, module in self._model.named_modules():
            self._known[id(module)] = module
            yield from self._module(module, f"model.{name}" if name else "model", of_loss=False)
        for name, root in roots().items():
            yield from self._value(root, name, _DEPTH)

    def _module(self, module: nn.Module, place: str, *, of_loss: bool) -> Iterator[_Part]:
        attributes = vars(module)
        yield Items(place, ".{}", lambda: attributes, _IGNORED)
        if attributes["_modules"]:
            yield Items(place, ".{}", lambda: attributes["_modules"])
        for name, value in attributes.items():
            if name not in OF_EVERY_MODULE and not name.startswith(OF_SHARDING) and not isinstance(value, SCALARS):
                yield from self._value(value, f"{place}.{name}", _DEPTH - 1, of_loss=of_loss)
        if not isinstance(module, _NormBase):  # whose statistics each pass moves
            yield Items(place, ".{}", lambda: attributes["_buffers"])
            frozen = {
                name: p
                for name, p in attributes["_parameters"].items()
                if type(p) is nn.Parameter and not p.requires_grad
            }
            for name, value in (attributes["_buffers"] | frozen).items():
                if value is not None and id(value) not in self._known and f"{place}.{name}" not in self._counters:
                    self._known[id(value)] = value
                    yield Values(f"{place}.{name}", value)
        if of_loss:
            yield from self._value(type(module).forward, f"{place}.forward", _DEPTH - 1)

    def _value(self, value: Any, place: str, depth: int, *, of_loss: bool = True) -> Iterator[_Part]:
        """Args:
        of_loss: whether the value belongs to the loss, so that functions and modules are looked into.
        """
        if isinstance(value, _OPAQUE) or id(value) in self._known or place in self._counters:
            return
        self._known[id(value)] = value
        if isinstance(value, Tensor | np.ndarray):
            if getattr(value, "grad_fn", None) is None:
                yield Values(place, value)
        elif isinstance(value, nn.Module):
            for name, module in value.named_modules() if of_loss else ():
                if module is value or id(module) not in self._known:
                    self._known[id(module)] = module
                    yield from self._module(module, f"{place}.{name}" if name else place, of_loss=True)
        elif depth and (read := self._reader(value, of_loss=of_loss)) is not None:
            if len(items := read()) > _MOST_ITEMS:
                yield Items(place, "", lambda: [len(read())])
                return
            is_container = isinstance(value, dict | list | tuple | deque | set)
            is_function = isinstance(value, FunctionType)
            item, at = ("[{!r}]", place) if is_container else ("{}", "") if is_function else (".{}", place)
            yield Items(at if isinstance(items, dict) else place, item, read, _IGNORED)
            named = items.items() if isinstance(items, dict) else enumerate(items)
            for key, inner in named:
                yield from self._value(inner, at + item.format(key), depth - 1, of_loss=of_loss)

    @staticmethod
    def _reader(value: Any, *, of_loss: bool) -> Callable[[], Any] | None:
        """Return a function that returns the items of a value; None if it is not to be looked into."""
        if isinstance(value, dict | list | tuple | deque | set | frozenset):
            return lambda: value
        if isinstance(value, FunctionType):
            return _reader_of_function(value) if of_loss and not _is_of_library(value) else None
        if isinstance(value, MethodType):
            return (lambda: {"__self__": value.__self__, "__func__": value.__func__}) if of_loss else None
        if isinstance(value, functools.partial):
            return lambda: {"func": value.func, "args": value.args, **value.keywords}
        attributes = None if _is_of_library(type(value)) else getattr(value, "__dict__", None)
        if not isinstance(attributes, dict):
            return None
        call = getattr(type(value), "__call__", None)  # noqa: B004
        if of_loss and isinstance(call, FunctionType):
            return lambda: {**attributes, "__call__": call}
        return lambda: attributes


def _reader_of_hooks(model: nn.Module) -> Callable[[], dict[str, int]]:
    """Return a function that returns the number of hooks of each module and each parameter."""
    modules = [(f"model.{name}" if name else "model", vars(module)) for name, module in model.named_modules()]
    weights = [(f"model.{name}", p) for name, p in model.named_parameters()]

    def read() -> dict[str, int]:
        found = {name: sum(len(attributes[kind]) for kind in ALL_HOOKS) for name, attributes in modules}
        return found | {name: n_hooks(p) for name, p in weights}

    return read


def _is_of_library(owner: Any) -> bool:
    module = str(getattr(owner, "__module__", None))
    return module.split(".")[0] in _LIBRARIES and module not in _NAMESPACES


def _reader_of_function(function: FunctionType) -> Callable[[], dict[str, Any]]:
    """Return a function that returns the values that a function refers to, by name."""
    code, known = function.__code__, function.__globals__
    names = [name for name in sorted(names_in(code)) if not isinstance(known.get(name, int), type | ModuleType)]
    cells = list(zip(code.co_freevars, function.__closure__ or (), strict=True))
    arguments = code.co_varnames[: code.co_argcount]

    def read() -> dict[str, Any]:
        found = {name: known.get(name) for name in names}
        found |= {name: _contents(cell) for name, cell in cells}
        defaults = function.__defaults__ or ()
        found |= dict(zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True))
        return found | (function.__kwdefaults__ or {})

    return read


def names_in(code: CodeType) -> set[str]:
    """Return the names of globals and attributes in a function and the functions inside it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(names_in, inner))


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None
