"""The columns of rows as arrays of numbers, to search all rows for values at once."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow
import torch
from datasets import Dataset
from torch import Tensor

from ..errors import DataError
from ..objective.own_rules import named_targets
from .dataset import Rows
from .row import Row, length_of

_LAZY_ROWS = 256  # to look at, if fetching a row computes it
_FETCHED_ROWS = 50_000  # to look at, if they are in memory, but not in a table
_MOST_NUMBERS = 10_000_000  # a column with more is left out; this many take half a second

_SAMPLED, _MOST_OFTEN = 100_000, 4  # numbers among which those are looked for that occur often, and how many of these

Values = dict[Any, tuple[int, int]]  # value → how often it occurs, and the shortest row that has it


@dataclass(frozen=True)
class NumberColumn:
    """The numbers of a column, row after row; those of row n begin at `starts[n]`."""

    numbers: np.ndarray
    starts: np.ndarray

    @classmethod
    def of_values(cls, values: Sequence[Any]) -> "NumberColumn | None":
        """Return the column; None if a row holds anything but numbers, or if there are too many numbers."""
        types = {type(value) for value in values}
        if len(types) == 1 and isinstance(values[0], int | float):
            return cls(np.array(values), np.arange(len(values) + 1))  # one conversion for all, which is faster
        if (first := numbers_of(values[0])) is not None and first.size * len(values) > 2 * _MOST_NUMBERS:
            return None  # before all of them are converted
        if types == {Tensor} and len({(value.shape, value.dtype, value.device) for value in values}) == 1:
            arrays = [numbers_of(torch.stack(list(values)))]
            sizes = [values[0].numel()] * len(values)
        else:
            arrays = [numbers_of(value) for value in values]
            sizes = [0 if array is None else array.size for array in arrays]
        known = [array.ravel() for array in arrays if array is not None and array.dtype.kind in "iufb"]
        if len(known) < len(arrays) or sum(sizes) > _MOST_NUMBERS:
            return None
        return cls(np.concatenate(known), np.cumsum([0, *sizes]))

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

    @cached_property
    def has_fractions(self) -> bool:
        """Whether any number is not whole, as those of measurements are."""
        return self.numbers.dtype.kind == "f" and bool(np.any(self.numbers[np.isfinite(self.numbers)] % 1))

    def nonfinite(self, lengths: np.ndarray) -> Values:
        """Return those of the values NaN, inf and -inf that occur. The arguments are those of `values`."""
        if self.numbers.dtype.kind != "f" or np.isfinite(self.numbers).all():
            return {}
        return self._found([math.nan, math.inf, -math.inf], lengths)

    def of_measurement(self, lengths: np.ndarray) -> Values:
        """Return the values of a column of measurements that may stand for something else than a measurement.

        These are NaN, infinities, the smallest and the largest number, and up to four numbers that occur most often, if
        they do so more than once among 100,000. Such numbers are often written where a measurement is missing. The
        median is returned as well, as the most frequent one.
        """
        finite = self.numbers[np.isfinite(self.numbers)]
        if not len(finite):
            return self.nonfinite(lengths)
        places = np.unique(np.random.RandomState(0).randint(len(finite), size=_SAMPLED))
        distinct, counts = np.unique(finite if len(finite) <= _SAMPLED else finite[places], return_counts=True)
        often = [n for n in np.argsort(-counts, kind="stable")[:_MOST_OFTEN] if counts[n] > 1]
        numbers = [finite.min(), finite.max(), *distinct[often]]
        return self.nonfinite(lengths) | self._found(numbers, lengths)

    def typical_row(self, lengths: np.ndarray) -> int:
        """Return the shortest row that has the median, and only finite numbers if there is such a row."""
        finite = self.numbers[np.isfinite(self.numbers)]
        middle = np.partition(finite, len(finite) // 2)[len(finite) // 2] if len(finite) else math.nan
        rows = self._owners(self.numbers == middle if len(finite) else np.isnan(self.numbers))
        whole = rows[~np.isin(rows, self._owners(~np.isfinite(self.numbers)))]
        return _shortest(whole if len(whole) else rows, lengths)

    def _found(self, values: Sequence[float], lengths: np.ndarray) -> Values:
        found: Values = {}
        for value in values:
            rows = self._owners(self.numbers == value if value == value else np.isnan(self.numbers))
            if len(rows):
                found[_key(value)] = len(rows), _shortest(rows, lengths)
        return found

    def _owners(self, are_wanted: np.ndarray) -> np.ndarray:
        """Return the row of each number that is wanted."""
        return np.searchsorted(self.starts, np.flatnonzero(are_wanted), side="right") - 1

    def unlike_rows(self, lengths: np.ndarray) -> list[int]:
        """Return rows with the fewest and with the most numbers of each value, shortest rows first.

        A loss that leaves out a value is a mean over more items in one row than in another. Return none if rows have
        one number each, or differ in how many they have: then any rows show that.

        Args:
            lengths: the length of each row.
        """
        sizes = np.diff(self.starts)
        if not len(sizes) or sizes[0] < 2 or (sizes != sizes[0]).any():
            return []
        found: dict[int, None] = {}
        for value in np.unique(self.numbers).tolist():
            counts = np.bincount(self._owners(self.numbers == value), minlength=len(sizes))
            if counts.min() < counts.max():
                for most in (counts.min(), counts.max()):
                    found.setdefault(_shortest(np.flatnonzero(counts == most), lengths))
        return list(found)

    def values_of(self, rows: Sequence[int]) -> set[Any]:
        """Return the distinct values of some rows; None stands for NaN."""
        return {_key(v) for row in rows for v in self.numbers[self.starts[row] : self.starts[row + 1]].tolist()}

    def rows_with(self, values: Sequence[float]) -> np.ndarray:
        """Return for each row whether it has one of these values; NaN is one, and floats are rounded to float32."""
        exact = np.float32 if self.numbers.dtype.kind == "f" else np.float64
        wanted, numbers = np.array(values, dtype=exact), self.numbers.astype(exact)
        found = np.isin(numbers, wanted) | (np.isnan(numbers) & np.isnan(wanted).any())
        return np.bincount(self._owners(found), minlength=len(self.starts) - 1) > 0


def readable_rows(rows: Rows, most: int) -> Sequence[Row]:
    """Return the first rows, up to the first one that cannot be read: training names it when it comes to it."""
    n_rows = min(len(rows), most)
    with suppress(DataError):
        return rows.fetch(range(n_rows))
    found: list[Row] = []
    with suppress(DataError):
        for position in range(n_rows):
            found += rows.fetch([position])
    return found or rows.fetch([0])


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
        fetched = readable_rows(rows, _FETCHED_ROWS if rows.in_memory else _LAZY_ROWS)
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
            [row.get(name) for row in (self.fetched if are_mappings else (named_targets(y) for _, y in self.fetched))]
        )


def numbers_of(value: Any) -> np.ndarray | None:
    """Return a value of a row as an array; None if it is a list of lists of unequal lengths."""
    if isinstance(value, Tensor):
        return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).cpu().numpy()
    try:
        return np.asarray(value)
    except ValueError:
        return None


def _shortest(rows: np.ndarray, lengths: np.ndarray) -> int:
    return int(rows[lengths[rows].argmin()])


def _key(value: Any) -> Any:
    return float(value) if isinstance(value, np.floating) and value == value else value if value == value else None
