"""The parts of an operand that operations on some positions need.

Shape suffixes: B rows, L positions.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor

from .selection import Selection
from .value import Frame, Value

T = TypeVar("T")


def at(operand: Any, selection: Selection, dim: int, ndim: int) -> Any:
    """Return what an elementwise operation on selected positions needs of an operand.

    Args:
        operand: a value, a tensor that broadcasts against values, or anything else, which is returned.
        dim: the dimension of positions of the result, negative.
        ndim: the number of dimensions of the result.
    """
    if isinstance(operand, Value):
        return operand.at(selection)
    if not isinstance(operand, Tensor) or operand.ndim < -dim or operand.shape[dim] == 1:
        has_rows = isinstance(operand, Tensor) and operand.ndim == ndim and operand.shape[0] != 1
        return selection.rows_of(operand) if has_rows else operand
    return selection.of(operand[(None,) * (ndim - operand.ndim)], dim)


def broadcasts(operand: Any, frame: Frame, dim: int, ndim: int) -> bool:
    """Return whether an operand has the rows and positions of a value, or one of each, or is no tensor."""
    if not isinstance(operand, Tensor):
        return True
    rows = operand.shape[0] if operand.ndim == ndim else 1
    positions = operand.shape[dim] if operand.ndim >= -dim else 1
    return operand.ndim <= ndim and rows in (1, frame.n_rows) and positions in (1, frame.length)


def found_in(operands: Iterable[Any], kind: type[T]) -> list[T]:
    """Return the operands of a kind, also those in lists."""
    found = []
    for operand in operands:
        if isinstance(operand, kind):
            found.append(operand)
        elif isinstance(operand, list | tuple):
            found += found_in(operand, kind)
    return found
