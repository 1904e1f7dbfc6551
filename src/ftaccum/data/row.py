"""One row of the data, in whatever form the user has it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import DataError

Row = Any  # a mapping of columns, or a tuple (inputs, targets)


FORMS = (
    "a datasets.Dataset, a list of dicts, a DataFrame, a dict of columns, a list of 1-D tensors of token ids, "
    "or a torch Dataset of dicts or (inputs, targets) tuples"
)


def check_row(row: Any, argument: str, name: str) -> None:
    """Raises DataError where the row of that name is none."""
    if not is_row(row):
        example = "{'text': '...', 'label': 1}" if isinstance(row, str) else "{'input_ids': [...], 'labels': 1}"
        raise DataError(
            f"`{argument}` must be {FORMS}, but {name} is a {type(row).__name__} instead. "
            f"Turn each row into a dict of columns, such as {example}."
        )


def is_row(row: Any) -> bool:
    return isinstance(row, dict | Mapping) or (isinstance(row, tuple) and len(row) == 2)  # dicts are seen faster


def length_of(row: Row) -> int:
    """A row's length in tokens, or in whatever its first column has along its first dimension; 1 for a number."""
    column = row[0] if isinstance(row, tuple) else row.get("input_ids", next(iter(row.values()), 0))
    return (
        len(column)
        if hasattr(column, "__len__") and not (isinstance(column, Tensor | np.ndarray) and not column.ndim)
        else 1
    )


def class_of(row: Row) -> int | None:
    """A row's one class number; None where its target is something else."""
    target = row[1] if isinstance(row, tuple) else row.get("labels", row.get("label"))
    number = target.item() if isinstance(target, Tensor | np.generic) and np.ndim(target) == 0 else target
    return number if isinstance(number, int) else None


def as_row(item: Any) -> Row:
    """A row in whatever form the user has it; a tensor of token ids is one."""
    if isinstance(item, Tensor) and item.ndim == 1 and not item.is_floating_point():
        return {"input_ids": item, "labels": item}  # token ids: each token is the one before's target
    return item
