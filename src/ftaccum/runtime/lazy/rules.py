"""Rules for operations that can be computed at some positions only.

A rule returns the result as a `Value` or a tuple of them, a tensor if the operation reads one position, or None if the
operation needs all positions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operand import at, broadcasts, found_in
from .selection import Selection
from .value import Frame, Value


@dataclass(frozen=True)
class Call:
    """A call of a function of torch, with values instead of lazy tensors."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def first(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else self.kwargs.get("input")

    def option(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument that is given by position or by name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def values(self) -> list[Value]:
        """Return the arguments that are values, also in lists."""
        return found_in([*self.args, *self.kwargs.values()], Value)

    def value(self, frame: Frame, dim: int, compute: Callable[[Selection], Tensor], *, draws: bool = False) -> Value:
        """Return the value that `compute` computes at selected positions."""
        operands = found_in([*self.args, *self.kwargs.values()], Tensor)
        return Value(frame, compute, dim, operands, draws=draws)


Rule = Callable[[Call], Value | tuple[Value, ...] | Tensor | None]


def elementwise(call: Call, *, draws: bool = False) -> Value | None:
    values = call.values()
    frame, dim, ndim = values[0].frame, values[0].dim, values[0].ndim
    others = [*call.args, *call.kwargs.values()]
    if any(value.dim != dim or value.ndim != ndim for value in values):
        return None
    if not all(broadcasts(other, frame, dim, ndim) for other in others):
        return None

    def compute(selection: Selection) -> Tensor:
        args = [at(operand, selection, dim, ndim) for operand in call.args]
        kwargs = {name: at(operand, selection, dim, ndim) for name, operand in call.kwargs.items()}
        return call.function(*args, **kwargs)

    return call.value(frame, dim, compute, draws=draws)


def dropout(call: Call) -> Value | None:
    return elementwise(call, draws=bool(call.option(2, "training", True) and call.option(1, "p", 0.5) > 0))


def within_positions(n_dims: Callable[[Call], int]) -> Callable[[Call], Value | None]:
    """Return the rule for functions of the last `n_dims` dimensions of their first argument."""

    def rule(call: Call) -> Value | None:
        value = call.first
        if not isinstance(value, Value) or not call.args or n_dims(call) >= -value.dim:
            return None
        if any(isinstance(operand, Value) for operand in (*call.args[1:], *call.kwargs.values())):
            return None
        compute = lambda selection: call.function(value.at(selection), *call.args[1:], **call.kwargs)
        return call.value(value.frame, value.dim, compute)

    return rule


def linear(call: Call) -> Value | None:
    found = within_positions(lambda _: 1)(call)
    if found is not None:
        found.n_weights = call.option(1, "weight").numel()
    return found


def along(place: int) -> Callable[[Call], Value | None]:
    """Return the rule for functions that work along one dimension, the argument at `place`, and keep it."""

    def n_dims(call: Call) -> int:
        value, dim = call.first, call.option(place, "dim")
        dims = [dim] if isinstance(dim, int) else dim
        if not isinstance(dims, list | tuple) or not dims:
            return value.ndim
        return max(-(d if d < 0 else d - value.ndim) for d in dims)

    return within_positions(n_dims)


def reduction(call: Call) -> Value | None:
    return along(1)(call) if call.option(2, "keepdim", False) is True else None


def view(call: Call) -> Value | None:
    value, *sizes = call.args
    if len(sizes) == 1 and not isinstance(sizes[0], int):
        (sizes,) = sizes
    if call.kwargs or not isinstance(value, Value) or not all(isinstance(size, int) for size in sizes):
        return None
    return _viewed(call, value, [*sizes])


def flatten(call: Call) -> Value | None:
    value, start, end = call.first, call.option(1, "start_dim", 0), call.option(2, "end_dim", -1)
    if not isinstance(value, Value):
        return None
    start, end = start % value.ndim, end % value.ndim
    shape = value.shape
    return _viewed(call, value, [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]])


def _viewed(call: Call, value: Value, sizes: list[int]) -> Value | None:
    if -1 in sizes:
        sizes[sizes.index(-1)] = math.prod(value.shape) // max(1, -math.prod(sizes))
    dim = _place_of_positions(value, sizes)
    if dim is None:
        return None

    def compute(selection: Selection) -> Tensor:
        found = value.at(selection)
        new = [*sizes]
        new[0], new[dim] = found.shape[0], found.shape[value.dim]
        return found.reshape(new)

    return call.value(value.frame, dim, compute)


def _place_of_positions(value: Value, sizes: Sequence[int]) -> int | None:
    """Return the dimension of positions in a view with these sizes, negative; None if it joins or splits them."""
    before, after = math.prod(value.shape[: value.dim]), math.prod(value.shape[value.dim :]) // value.frame.length
    if not sizes or sizes[0] != value.shape[0] or value.ndim + value.dim == 0:
        return None
    for place in range(1, len(sizes)):
        is_here = sizes[place] == value.frame.length and math.prod(sizes[:place]) == before
        if is_here and math.prod(sizes[place + 1 :]) == after:
            return place - len(sizes)
    return None


def permute(call: Call) -> Value | None:
    value, *order = call.args
    if call.function in (Tensor.permute, torch.permute):
        order = [*order[0]] if len(order) == 1 and not isinstance(order[0], int) else order
        order = [d % value.ndim for d in order] if len(order) == value.ndim and not call.kwargs else []
    elif len(order) == 2 and not call.kwargs:  # transpose
        one, other = (d % value.ndim for d in order)
        order = [{one: other, other: one}.get(d, d) for d in range(value.ndim)]
    else:
        order = []
    if not order or order[0] != 0:
        return None
    dim = order.index(value.ndim + value.dim) - value.ndim
    return call.value(value.frame, dim, lambda selection: value.at(selection).permute(order))


def split(call: Call) -> tuple[Value, ...] | None:
    value, dim = call.first, call.option(2, "dim", 0)
    if not isinstance(value, Value) or not isinstance(dim, int) or (dim if dim < 0 else dim - value.ndim) <= value.dim:
        return None
    n_parts = len(call.function(value.like, *call.args[1:], **call.kwargs))

    def part(number: int) -> Callable[[Selection], Tensor]:
        return lambda selection: call.function(value.at(selection), *call.args[1:], **call.kwargs)[number]

    return tuple(call.value(value.frame, value.dim, part(number)) for number in range(n_parts))


def concatenate(call: Call) -> Value | None:
    parts, dim = call.first, call.option(1, "dim", 0)
    if not isinstance(parts, list | tuple) or not all(isinstance(part, Value) for part in parts):
        return None
    value = parts[0]
    is_after = (dim if dim < 0 else dim - value.ndim) > value.dim
    if not is_after or any(part.dim != value.dim or part.ndim != value.ndim for part in parts):
        return None
    return call.value(value.frame, value.dim, lambda selection: torch.cat([part.at(selection) for part in parts], dim))


def matmul(call: Call) -> Value | None:
    """The rule for a product whose rows are positions. The other factor is needed in full."""
    if len(call.args) != 2 or call.kwargs or not isinstance(call.args[0], Value) or call.args[0].dim > -2:
        return None
    value, other = call.args
    if other.ndim not in (2, value.ndim) or (other.ndim == value.ndim and value.dim != -2):
        return None
    if other.ndim == value.ndim and other.shape[0] != value.frame.n_rows:
        return None
    factor = other.whole() if isinstance(other, Value) else other
    has_rows = factor.ndim == value.ndim

    def compute(selection: Selection) -> Tensor:
        return value.at(selection) @ (selection.rows_of(factor) if has_rows else factor)

    return call.value(value.frame, value.dim, compute)


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Value | None:
    """The rule for attention, with the arguments of `scaled_dot_product_attention`: queries are positions."""
    if (
        not isinstance(query, Value)
        or query.ndim != 4
        or query.dim != -2
        or not broadcasts(attn_mask, query.frame, -2, query.ndim)
    ):
        return None
    keys, values = (operand.whole() if isinstance(operand, Value) else operand for operand in (key, value))
    if not keys.shape[0] == values.shape[0] == query.frame.n_rows or isinstance(attn_mask, Value):
        return None

    def compute(selection: Selection) -> Tensor:
        mask = selection.causal(keys.shape[-2], keys.device) if is_causal else None
        mask = at(attn_mask, selection, -2, query.ndim) if mask is None else mask
        return F.scaled_dot_product_attention(
            query.at(selection),
            selection.rows_of(keys),
            selection.rows_of(values),
            attn_mask=mask,
            dropout_p=dropout_p,
            is_causal=is_causal and mask is None,
            **options,
        )

    operands = found_in([keys, values, attn_mask], Tensor)
    return Value(query.frame, compute, -2, operands, draws=dropout_p > 0)


def _on_tensors(*names: str) -> list[Any]:
    """Return the functions with these names, of torch, of `torch.nn.functional` and methods of tensors."""
    return [getattr(owner, name) for name in names for owner in (torch, F, Tensor) if hasattr(owner, name)]


_OPERATORS = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "neg")
_ELEMENTWISE = (
    *(f"__{name}__" for name in _OPERATORS),
    *("add", "sub", "mul", "div", "true_divide", "pow", "neg", "abs", "exp", "square", "sqrt", "rsqrt", "reciprocal"),
    *("tanh", "sigmoid", "erf", "clamp", "minimum", "maximum", "where", "masked_fill", "softplus"),
    *("gelu", "relu", "silu", "mish", "relu6", "hardswish", "elu", "leaky_relu"),
)
_CONVERSIONS = ("to", "float", "double", "half", "bfloat16", "type_as", "contiguous", "clone", "detach")
_SIZE_OF_NORM = within_positions(
    lambda call: len(call.args[1]) if len(call.args) > 1 else len(call.kwargs["normalized_shape"])
)

RULES: dict[Any, Rule] = {
    **dict.fromkeys(_on_tensors(*_ELEMENTWISE), elementwise),
    **dict.fromkeys(_on_tensors(*_CONVERSIONS), within_positions(lambda _: 0)),
    **dict.fromkeys(_on_tensors("layer_norm", "rms_norm"), _SIZE_OF_NORM),
    **dict.fromkeys(_on_tensors("softmax", "log_softmax"), along(1)),
    **dict.fromkeys(_on_tensors("mean", "sum", "amax"), reduction),
    **dict.fromkeys(_on_tensors("view", "reshape"), view),
    **dict.fromkeys(_on_tensors("flatten"), flatten),
    **dict.fromkeys(_on_tensors("transpose", "swapaxes", "permute"), permute),
    **dict.fromkeys(_on_tensors("chunk", "split"), split),
    **dict.fromkeys(_on_tensors("cat", "concat"), concatenate),
    **dict.fromkeys(_on_tensors("matmul", "__matmul__"), matmul),
    F.linear: linear,
    F.dropout: dropout,
    F.scaled_dot_product_attention: lambda call: attention(*call.args, **call.kwargs),
}
