"""One row of the user's data."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import DataError
from ..objective.prefixed import length_columns

Row = Any  # a mapping of columns, or a tuple (inputs, targets)

FORMS = (
    "a datasets.Dataset, a list of dicts, a DataFrame, a dict of columns, a list of 1-D tensors of token ids, "
    "or a torch Dataset of dicts or (inputs, targets) tuples"
)


def check_row(row: Any, argument: str, name: str) -> None:
    """Raise DataError if an item of the data, which messages call `name`, is not a row."""
    if not is_row(row):
        example = "{'text': '...', 'label': 1}" if isinstance(row, str) else "{'input_ids': [...], 'labels': 1}"
        raise DataError(
            f"`{argument}` must be {FORMS}, but {name} is a {type(row).__name__} instead. "
            f"Turn each row into a dict of columns, such as {example}."
        )


def is_row(row: Any) -> bool:
    return isinstance(row, dict | Mapping) or (isinstance(row, tuple) and len(row) == 2)  # checking for dict is faster


def length_of(row: Row) -> int:
    """Return a row's length in tokens, or else the first dimension of its first column; 1 for a number.

    If a row has several texts, such as `chosen_input_ids` and `rejected_input_ids`, it is that of the longest.
    """
    return max(_lengths(row))


def tokens_of(row: Row) -> int:
    """Return the number of tokens of all texts of a row. For a row with one text, it is `length_of`."""
    return sum(_lengths(row))


def _lengths(row: Row) -> list[int]:
    if isinstance(row, tuple):
        return [_size(row[0])]
    return [_size(row[name]) for name in length_columns(row)] or [_size(next(iter(row.values()), 0))]


def _size(value: Any) -> int:
    is_number = isinstance(value, Tensor | np.ndarray) and not value.ndim
    return len(value) if hasattr(value, "__len__") and not is_number else 1


def class_of(row: Row) -> int | None:
    """Return a row's class number; None if its target is anything else."""
    target = row[1] if isinstance(row, tuple) else row.get("labels", row.get("label"))
    number = target.item() if isinstance(target, Tensor | np.generic) and np.ndim(target) == 0 else target
    return number if isinstance(number, int) else None


def as_row(item: Any) -> Row:
    """Return an item of the data as a row: a tensor of token ids becomes a dict, anything else stays as it is."""
    if isinstance(item, Tensor) and item.ndim == 1 and not item.is_floating_point():
        return {"input_ids": item, "labels": item}  # each token is the target of the one before it
    return item
