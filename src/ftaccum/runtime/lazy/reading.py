"""Indexing of values: a selection of features, or the positions at which a value is read."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .rules import Call
from .selection import Pairs, Position
from .value import Value

_ALL = slice(None)


def getitem(call: Call) -> Value | Tensor | None:
    """The rule for `value[...]`."""
    value, index = call.args
    items = _full_index(index, value.ndim) if isinstance(value, Value) else None
    if items is None:
        return None
    place = value.ndim + value.dim  # of positions
    if items[0] == _ALL and items[place] == _ALL:
        return _features(call, value, items, place)
    return _read(value, items) if place == 1 else None


def _full_index(index: Any, ndim: int) -> list[Any] | None:
    """Return one item for each dimension; None if the index adds dimensions."""
    items = [*index] if isinstance(index, tuple) else [index]
    if any(item is None or isinstance(item, bool | list) for item in items):
        return None
    if any(isinstance(item, Tensor) and (item.dtype != torch.int64 or item.ndim != 1) for item in items):
        return None
    dots = [n for n, item in enumerate(items) if item is Ellipsis]
    if len(dots) > 1:
        return None
    if dots:
        items[dots[0] : dots[0] + 1] = [_ALL] * (ndim - len(items) + 1)
    return [*items, *[_ALL] * (ndim - len(items))]


def _features(call: Call, value: Value, items: list[Any], place: int) -> Value | None:
    if not all(isinstance(item, slice | int) for item in items) or any(item != _ALL for item in items[:place]):
        return None
    dim = value.dim + sum(isinstance(item, int) for item in items[place + 1 :])
    return call.value(value.frame, dim, lambda selection: value.at(selection)[tuple(items)])


def _read(value: Value, items: Sequence[Any]) -> Tensor | None:
    rows, positions, *others = items
    if isinstance(rows, slice):
        position = _one_position(positions, value.frame.length) if rows == _ALL else None
        if position is None:
            return None
        found = value.at(Position(position))
        rest = (_ALL, 0 if isinstance(positions, int) else _ALL, *others)
        return found[rest]
    are_pairs = isinstance(rows, Tensor) and isinstance(positions, Tensor) and rows.shape == positions.shape
    if not are_pairs or not all(isinstance(item, slice) and item == _ALL for item in others):
        return None
    return _of_pairs(value, rows, positions)


def _of_pairs(value: Value, rows: Tensor, positions: Tensor) -> Tensor:
    """Return the value at pairs of a row and a position. A pair that is given twice is computed once."""
    frame = value.frame
    for index, size in ((rows, frame.n_rows), (positions, frame.length)):
        if not ((index >= -size) & (index < size)).all():
            raise IndexError(f"an index is out of bounds for a dimension of size {size}")
    places, inverse = torch.unique(rows % frame.n_rows * frame.length + positions % frame.length, return_inverse=True)
    if len(places) == len(rows):
        return value.at(Pairs(rows % frame.n_rows, positions % frame.length))[:, 0]
    return value.at(Pairs(places // frame.length, places % frame.length))[inverse, 0]


def _one_position(item: Any, length: int) -> int | None:
    """Return the only position that an item of an index selects, from 0; None if it selects others."""
    if isinstance(item, int) and -length <= item < length:
        return item % length
    if isinstance(item, slice):
        positions = range(length)[item]
        return positions[0] if len(positions) == 1 else None
    return None
