"""A tensor whose operations are recorded, and computed only at the positions that are read.

    hidden = lazy(hidden_BLH)             # B rows of L positions
    scores = linear(gelu(linear(hidden)))  # computes nothing
    first = scores[:, 0]                  # computes both layers for one position of each row

The rest of the program does not notice: an operation without a rule computes its arguments at all positions, and runs
on them. Operations in place raise `LazyError`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .reading import getitem
from .rules import RULES, Call, Rule
from .value import Frame, LazyError, Value

_RULES: dict[Any, Rule] = {**RULES, Tensor.__getitem__: getitem}
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.element_size, Tensor.__len__),
}
_REQUIRES_GRAD = getattr(Tensor, "requires_grad").__get__  # noqa: B009
_IN_PLACE = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__setitem__", "__set__"}


def lazy(hidden_BLH: Tensor) -> tuple["LazyTensor", Frame]:
    """Return hidden states as a lazy tensor, and its frame, which shows later what was computed."""
    frame = Frame.of(hidden_BLH)
    leaf = Value(frame, lambda selection: selection.of(hidden_BLH, -2), -2, [hidden_BLH])
    return LazyTensor(leaf), frame


class LazyTensor(Tensor):
    """A tensor that is computed when it is read; see the module."""

    value: Value

    @staticmethod
    def __new__(cls, value: Value) -> "LazyTensor":
        like = value.like
        made: LazyTensor = Tensor._make_wrapper_subclass(cls, value.shape, dtype=like.dtype, device=like.device)
        made.value = value
        return made

    def __init__(self, value: Value) -> None:
        """Args:
        value: how to compute it.
        """

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyTensor(shape={tuple(self.value.shape)})"

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if function == _REQUIRES_GRAD:
            return args[0].value.like.requires_grad
        if _is_in_place(function, args, kwargs):
            raise LazyError(f"`{function.__name__}` changes a tensor in place")
        call = Call(function, _replaced(args, _value_of), {n: _replaced(a, _value_of) for n, a in kwargs.items()})
        found = _by_rule(call)
        if found is None:
            found = function(*_replaced(args, whole), **{n: _replaced(a, whole) for n, a in kwargs.items()})
        return _replaced(found, _wrapped)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise LazyError(f"`{function}` does not call `__torch_function__`")


def is_lazy(given: Any) -> bool:
    """Return whether a value is a lazy tensor."""
    return isinstance(given, LazyTensor)


def whole(given: Any) -> Any:
    """Return a lazy tensor as a plain tensor, and anything else as it is."""
    return given.value.whole() if isinstance(given, LazyTensor) else given


def _by_rule(call: Call) -> Any:
    """Return the result of a call at the positions that are read later, or are read now; None if it needs all."""
    rule, values = _RULES.get(call.function), call.values()
    frame = values[0].frame
    if rule is None or not frame.is_current() or any(value.frame is not frame for value in values):
        return None
    try:
        return rule(call)
    except LazyError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):  # arguments without a rule
        return None


def _is_in_place(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    name, place = getattr(function, "__name__", ""), _place_of_inplace(function)
    if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or kwargs.get("out") is not None:
        return True
    return place is not None and bool(args[place] if len(args) > place else kwargs.get("inplace"))


@functools.cache
def _place_of_inplace(function: Any) -> int | None:
    """Return the position of a function's argument `inplace`; None if it has none."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a function in C
        return None
    return names.index("inplace") if "inplace" in names else None


def _replaced(given: Any, replace: Callable[[Any], Any]) -> Any:
    """Return an argument with its lazy tensors or values replaced, also in lists, tuples and dicts."""
    if type(given) in (list, tuple):
        return type(given)(_replaced(item, replace) for item in given)
    if type(given) is dict:
        return {name: _replaced(item, replace) for name, item in given.items()}
    return replace(given)


def _value_of(given: Any) -> Any:
    return given.value if isinstance(given, LazyTensor) else given


def _wrapped(given: Any) -> Any:
    return LazyTensor(given) if isinstance(given, Value) else given
