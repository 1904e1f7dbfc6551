"""The columns of rows as arrays of numbers, to search all rows for values at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
import torch
from datasets import Dataset
from torch import Tensor

from .dataset import Rows
from .row import Row, length_of

_LAZY_ROWS = 256  # to look at, if fetching a row computes it
_FETCHED_ROWS = 50_000  # to look at, if they are in memory, but not in a table
_MOST_NUMBERS = 10_000_000  # a column with more is left out; this many take half a second

Values = dict[Any, tuple[int, int]]  # value → how often it occurs, and the shortest row that has it


@dataclass(frozen=True)
class NumberColumn:
    """The numbers of a column, row after row; those of row n begin at `starts[n]`."""

    numbers: np.ndarray
    starts: np.ndarray

    @classmethod
    def of_values(cls, values: Sequence[Any]) -> "NumberColumn | None":
        """Return the column; None if a row holds anything but numbers, or if there are too many numbers."""
        if len({type(value) for value in values}) == 1 and isinstance(values[0], int | float):
            return cls(np.array(values), np.arange(len(values) + 1))  # one conversion for all, which is faster
        arrays = [numbers_of(value) for value in values]
        known = [array.ravel() for array in arrays if array is not None and array.dtype.kind in "iufb"]
        if len(known) < len(arrays) or sum(array.size for array in known) > _MOST_NUMBERS:
            return None
        return cls(np.concatenate(known), np.cumsum([0, *(array.size for array in known)]))

    @classmethod
    def of_table(cls, table: Dataset, name: str) -> "NumberColumn | None":
        """Return a column of a table; None if it holds anything but numbers, or too many of them."""
        column = table.select_columns([name]).with_format("arrow")[:][name].combine_chunks()
        owners = np.arange(len(column))
        while hasattr(column, "value_parent_indices"):  # lists
            owners = owners[column.value_parent_indices().to_numpy()]
            column = column.flatten()
        numbers = column.to_numpy(zero_copy_only=False)
        if column.null_count or numbers.dtype.kind not in "iufb" or len(numbers) > _MOST_NUMBERS:
            return None
        return cls(numbers, np.searchsorted(owners, np.arange(len(table) + 1)))

    def values(self, lengths: np.ndarray) -> Values:
        """Return the distinct values; None stands for NaN.

        Args:
            lengths: the length of each row.
        """
        by_length = np.argsort(lengths, kind="stable")
        ranks = np.empty_like(by_length)
        ranks[by_length] = np.arange(len(by_length))
        table = pyarrow.table({"value": self.numbers, "rank": np.repeat(ranks, np.diff(self.starts))})
        found = table.group_by("value", use_threads=False).aggregate([("rank", "count"), ("rank", "min")])
        columns = (found[name].to_pylist() for name in ("value", "rank_count", "rank_min"))
        return {_key(value): (count, int(by_length[rank])) for value, count, rank in zip(*columns, strict=True)}

    def values_of(self, rows: Sequence[int]) -> set[Any]:
        """Return the distinct values of some rows; None stands for NaN."""
        return {_key(v) for row in rows for v in self.numbers[self.starts[row] : self.starts[row + 1]].tolist()}

    def rows_with(self, values: Sequence[float]) -> np.ndarray:
        """Return for each row whether it has one of these values; NaN is one, and floats are rounded to float32."""
        exact = np.float32 if self.numbers.dtype.kind == "f" else np.float64
        wanted, numbers = np.array(values, dtype=exact), self.numbers.astype(exact)
        found = np.isin(numbers, wanted) | (np.isnan(numbers) & np.isnan(wanted).any())
        owners = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        return np.bincount(owners[found], minlength=len(self.starts) - 1) > 0


@dataclass(frozen=True)
class SearchedRows:
    """The rows to search, or the first of them if there are many.

    Attributes:
        table: the rows as a table, if their columns can be read without fetching rows; else None.
        fetched: the rows, if there is no table.
        lengths: the length of each row.
    """

    table: Dataset | None
    fetched: Sequence[Row]
    lengths: np.ndarray

    @classmethod
    def of(cls, rows: Rows) -> "SearchedRows":
        """Read the lengths of the rows."""
        if rows.in_memory and isinstance(rows.source, Dataset):
            return cls(rows.table, (), np.array(rows.lengths() or [1] * len(rows)))
        fetched = rows.fetch(range(min(len(rows), _FETCHED_ROWS if rows.in_memory else _LAZY_ROWS)))
        lengths = rows.lengths(range(len(fetched))) or [length_of(row) for row in fetched]
        return cls(None, fetched, np.array(lengths))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def names(self) -> list[str]:
        """The names of the columns of the first row; empty if it is a tuple."""
        if self.table is not None:
            return list(self.table.column_names)
        return list(self.fetched[0]) if isinstance(self.fetched[0], Mapping) else []

    def column(self, name: str) -> NumberColumn | None:
        """Return the numbers of a column, or of the targets of tuples; None if it holds anything else, or too many."""
        if self.table is not None:
            return NumberColumn.of_table(self.table, name)
        are_mappings = isinstance(self.fetched[0], Mapping)
        return NumberColumn.of_values(
            [row.get(name) for row in self.fetched] if are_mappings else [y for _, y in self.fetched]
        )


def numbers_of(value: Any) -> np.ndarray | None:
    """Return a value of a row as an array; None if it is a list of lists of unequal lengths."""
    if isinstance(value, Tensor):
        return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).cpu().numpy()
    try:
        return np.asarray(value)
    except ValueError:
        return None


def _key(value: Any) -> Any:
    return value if value == value else None  # NaN does not equal itself
