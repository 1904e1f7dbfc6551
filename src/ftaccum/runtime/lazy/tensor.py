"""A tensor whose operations are recorded, and computed only at the positions that are read.

    hidden = LazyPass(hidden_BLH).hidden    # B rows of L positions
    scores = linear(gelu(linear(hidden)))   # computes nothing
    first = scores[:, 0]                    # computes both layers for one position of each row

The rest of the program does not notice: an operation without a rule computes its arguments at all positions, and runs
on them. Operations in place, without gradients, or on gradients raise `LazyError`.
"""

import functools
import inspect
import weakref
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
_AUGMENTED = "add sub mul truediv floordiv mod pow and or xor lshift rshift matmul"
_ON_GRADIENTS = {"grad", "backward", "register_hook", "retain_grad"}
_IN_PLACE = {*(f"__i{name}__" for name in _AUGMENTED.split()), "__setitem__", "__set__"}


class LazyPass:
    """One forward pass with lazy tensors."""

    def __init__(self, hidden_BLH: Tensor) -> None:
        """Args:
        hidden_BLH: the hidden states to make lazy.
        """
        self.frame = Frame.of(hidden_BLH)
        self._made: list[weakref.ref[LazyTensor]] = []
        leaf = Value(self.frame, lambda selection: selection.of(hidden_BLH, -2), -2, [hidden_BLH])
        self.hidden = LazyTensor(leaf, self._made)

    def close(self) -> None:
        """Compute the lazy tensors that are still in use at all positions. From now on, they are as plain ones.

        Raises:
            LazyError: if the result would depend on when they are computed.
        """
        for reference in self._made:
            if (tensor := reference()) is not None:
                tensor.value.whole()
        self.frame.is_open = False


class LazyTensor(Tensor):
    """A tensor that is computed when it is read; see the module."""

    value: Value
    made: "list[weakref.ref[LazyTensor]]"

    @staticmethod
    def __new__(cls, value: Value, made: "list[weakref.ref[LazyTensor]]") -> "LazyTensor":
        like = value.like
        new: LazyTensor = Tensor._make_wrapper_subclass(cls, value.shape, dtype=like.dtype, device=like.device)
        new.value, new.made = value, made
        made.append(weakref.ref(new))
        return new

    def __init__(self, value: Value, made: "list[weakref.ref[LazyTensor]]") -> None:
        """Args:
        value: how to compute it.
        made: the lazy tensors of the pass.
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
        lazy = _lazy_in([*args, *kwargs.values()])
        if function == _REQUIRES_GRAD:
            return lazy[0].value.like.requires_grad
        frame = lazy[0].value.frame
        if frame.is_open:
            _refuse(function, args, kwargs, frame)
        found = _by_rule(function, args, kwargs, [tensor.value for tensor in lazy]) if frame.is_open else None
        if found is None:
            found = function(*_replaced(args, whole), **{n: _replaced(a, whole) for n, a in kwargs.items()})
        return _replaced(found, lambda given: LazyTensor(given, lazy[0].made) if isinstance(given, Value) else given)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise LazyError(f"`{function}` does not call `__torch_function__`")


def is_lazy(given: Any) -> bool:
    """Return whether a value is a lazy tensor."""
    return isinstance(given, LazyTensor)


def whole(given: Any) -> Any:
    """Return a lazy tensor as a plain tensor, and anything else as it is."""
    return given.value.whole() if isinstance(given, LazyTensor) else given


def _lazy_in(given: Sequence[Any]) -> list[LazyTensor]:
    found: list[LazyTensor] = []
    _replaced(list(given), lambda each: found.append(each) if isinstance(each, LazyTensor) else None)
    return found


def _refuse(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], frame: Frame) -> None:
    """Raise LazyError for operations that lazy tensors do not support."""
    name, place = getattr(function, "__name__", ""), _place_of_inplace(function)
    is_in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or kwargs.get("out") is not None
    if place is not None:
        is_in_place |= bool(args[place] if len(args) > place else kwargs.get("inplace"))
    if is_in_place or (isinstance(function, torch._ops.OpOverload) and function._schema.is_mutable):
        raise LazyError(f"`{name}` changes a tensor in place")
    if name in _ON_GRADIENTS:  # a value that is computed again has another place in the graph
        raise LazyError(f"`{name}` needs one tensor in the graph")
    if frame.grad and not torch.is_grad_enabled():  # as in a function of autograd, which would lose the gradient
        raise LazyError(f"`{name}` runs without gradients")


def _by_rule(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], values: Sequence[Value]) -> Any:
    """Return the result of a call at the positions that are read later, or are read now; None if it needs all."""
    rule, frame = _RULES.get(function), values[0].frame
    if rule is None or not frame.is_current() or any(value.frame is not frame for value in values):
        return None
    call = Call(function, _replaced(tuple(args), _value_of), {n: _replaced(a, _value_of) for n, a in kwargs.items()})
    try:
        return rule(call)
    except LazyError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):  # arguments without a rule
        return None


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
