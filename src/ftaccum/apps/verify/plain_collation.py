"""A minimal collator for the reference, which shares no code with the collator of training."""

import functools
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError

_RENAMED = {"label": "labels", "label_ids": "labels"}
_MAIN = ("input_ids", "input_values", "input_features")  # they define the length of a row


class PlainCollator:
    """A collator that stacks columns, and pads those that run along the tokens.

    It adds an attention mask to `input_ids` that have none. It corrects nothing else: a column that some rows lack, or
    that differs in shape and cannot be padded, is an error.
    """

    def __init__(
        self, needed: set[str] | None, *, pad_token_id: int = 0, ignore_index: int = -100, on_the_left: bool = False
    ) -> None:
        """Create a collator.

        Args:
            needed: the columns to keep in addition to `input_ids` and `labels`; None for all numeric columns.
            pad_token_id: the padding value of `input_ids`.
            ignore_index: the padding value of labels.
            on_the_left: whether padding goes before the values instead of after them.
        """
        self._needed = None if needed is None else {*needed, "input_ids", "labels"}
        self._pad_token_id, self._ignore_index, self._left = pad_token_id, ignore_index, on_the_left

    def __call__(self, rows: Sequence[Any]) -> Any:
        """Return the batch.

        Raises:
            DataError: if the rows do not share a column; the message names it.
        """
        if isinstance(rows[0], tuple):
            return tuple(_stacked(column) for column in zip(*rows, strict=True))
        columns = self._columns([{_RENAMED.get(n, n): v for n, v in (*row.items(), *_exact(row))} for row in rows])
        main = next((columns[name] for name in _MAIN if name in columns), [])
        batch = {name: self._padded(name, values, main) for name, values in columns.items()}
        if "input_ids" in batch and "attention_mask" not in batch:
            batch["attention_mask"] = self._filled([torch.ones_like(t) for t in main], 0)
        return batch

    def _columns(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Tensor]]:
        names = dict.fromkeys(name for row in rows for name, value in row.items() if _is_numeric(value))
        columns = {}
        for name in names if self._needed is None else [n for n in names if n in self._needed]:
            if not all(name in row and _is_numeric(row[name]) for row in rows):
                raise DataError(
                    f"Only some of the rows have numbers in the column {name!r}. Give it to all rows, or to none."
                )
            tensors = [_tensor(row[name]) for row in rows]
            integers = name.endswith("_ids") or "label" in name or name.endswith("_positions")
            columns[name] = [t.long() if integers and _is_integer(t) else t for t in tensors]
        return columns

    def _padded(self, name: str, values: Sequence[Tensor], main: Sequence[Tensor]) -> Tensor:
        fill = self._pad_token_id if name == "input_ids" else self._ignore_index if "label" in name else 0
        are_class_numbers = "label" in name and not any(t.is_floating_point() for t in values)
        along = values is main or are_class_numbers or name.startswith("decoder_") or _run_along(values, main)
        if len({t.shape for t in values}) > 1 and not along:
            raise DataError(
                f"The column {name!r} has rows of the shapes {sorted({tuple(t.shape) for t in values})}, and does not "
                "run along the tokens. Give all rows the same shape, or a `data_collator` that pads this column."
            )
        return self._filled(values, fill)

    def _filled(self, values: Sequence[Tensor], fill: int) -> Tensor:
        dtypes = {t.dtype for t in values if t.numel()} or {values[0].dtype}
        dtype = functools.reduce(torch.promote_types, dtypes)
        # All rows may be empty, but a model needs at least one token.
        size = tuple(max(1, *lengths) for lengths in zip(*(value.shape for value in values), strict=True))
        batch = torch.full((len(values), *size), fill, dtype=dtype)
        for row, value in zip(batch, values, strict=True):
            places = [slice(m - n, m) if self._left else slice(n) for n, m in zip(value.shape, size, strict=True)]
            row[tuple(places)] = value.to(dtype)
        return batch


def documents_of(row: Any) -> list[Any]:
    """Split a packed row into its documents, and return each as a row. Return any other row unchanged.

    A packed row has `position_ids` that restart, and no attention mask. All of its columns run along the tokens.
    """
    if not isinstance(row, Mapping) or "position_ids" not in row or "attention_mask" in row:
        return [row]
    columns = {name: _tensor(value) for name, value in row.items() if _is_numeric(value)}
    positions = columns["position_ids"]
    if positions.ndim != 1 or any(value.shape[:1] != positions.shape for value in columns.values()):
        return [row]
    starts = [0, *(n for n in range(1, len(positions)) if int(positions[n]) <= int(positions[n - 1])), len(positions)]
    return [{name: value[first:end] for name, value in columns.items()} for first, end in pairwise(starts)]


def _exact(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the columns that need no renaming. They take precedence over renamed columns."""
    return [(name, value) for name, value in row.items() if name not in _RENAMED]


def _run_along(values: Sequence[Tensor], main: Sequence[Tensor]) -> bool:
    """Return whether the leading dimensions of each value are those of the row's tokens."""
    return bool(main) and all(
        t.ndim and t.shape[: m.ndim] == m.shape[: t.ndim] for t, m in zip(values, main, strict=True)
    )


def _is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and tensor.dtype != torch.bool


def _is_numeric(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return value == [] if isinstance(value, list) else isinstance(value, Tensor | np.ndarray | np.generic | int | float)


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.empty(0, dtype=torch.long) if isinstance(value, list) and not value else torch.as_tensor(value)


def _stacked(column: Sequence[Any]) -> Any:
    if isinstance(column[0], Mapping):
        return {name: _stacked([item[name] for item in column]) for name in column[0]}
    if isinstance(column[0], tuple):
        return tuple(_stacked(part) for part in zip(*column, strict=True))
    return torch.stack([_tensor(item) for item in column])
