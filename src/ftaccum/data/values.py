"""Turn a row's value into a tensor."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .row import Row

_REMEDY = "Fix or drop the row, drop the column if nothing needs it, or give a `data_collator`."


class OddRowError(ValueError):
    """The error for a row that does not fit the other rows of its batch.

    Attributes:
        place: the index of the row in the batch.
        remedy: what to do, as a sentence.
    """

    def __init__(self, place: int, problem: str, remedy: str | None = None) -> None:
        super().__init__(problem)
        self.place, self.remedy = place, remedy or _REMEDY


def column_name(key: str) -> str:
    """Return the name that Transformers' models have for a column."""
    return {"label": "labels", "label_ids": "labels"}.get(key, key)


def is_numeric(value: Any) -> bool:
    """Return whether a value can become a tensor, judging by its first element."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, Tensor | np.ndarray | np.generic | int | float) or value == []


def tensor_of(row: Row, key: str, place: int) -> Tensor:
    """Return a row's value in a column.

    Raises:
        OddRowError: if the value is neither a number nor a list of numbers.
    """
    value = row[key]
    if not is_numeric(value):
        raise OddRowError(place, f"its column {key!r} holds {value!r}, which is neither a number nor a list of numbers")
    try:
        return as_tensor(value)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise OddRowError(place, f"its column {key!r} cannot become a tensor: {error}") from error


def as_tensor(value: Any) -> Tensor:
    """Return a value as a tensor of a dtype that PyTorch computes with. (It can only store uint16 and wider.)"""
    if isinstance(value, list | tuple):
        # Python's floats get torch's default dtype; an empty list has no dtype.
        tensor = torch.tensor(value) if len(value) else torch.empty(0, dtype=torch.long)
    else:
        value = np.asarray(value) if isinstance(value, np.generic) else value
        tensor = torch.tensor(value) if isinstance(value, float) else torch.as_tensor(value)
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) else tensor
