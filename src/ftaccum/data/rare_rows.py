"""The choice of rows that cover every value of the labels, and of other columns with few distinct values."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
import torch
from datasets import Dataset
from torch import Tensor

from ..objective.model_forward import is_label
from ..objective.own_rules import TARGETS
from ..objective.prefixed import is_tokens_column
from .dataset import Rows
from .row import Row, length_of

_MOST_ROWS = 64
_LAZY_ROWS = 256  # to look at, if fetching a row computes it
_FETCHED_ROWS = 50_000  # to look at, if they are in memory, but not in a table
_MOST_NUMBERS = 10_000_000  # a column with more is left out; this many take half a second
_MOST_LABELS, _MOST_KINDS = 1000, 64  # distinct values of labels, and of other columns; a vocabulary has more
_FEW_LABELS = 32  # label values; up to this number, one more row may be chosen for each

Values = dict[Any, tuple[int, int]]  # value → how often it occurs, and the shortest row that has it


@dataclass(frozen=True)
class RareRows:
    """Rows to measure a loss on, besides the four of `sample_of`.

    Attributes:
        positions: those of a row with the most frequent label (or value of another column), and of up to 64 rare rows,
            shortest first; empty if no column has few values.
        not_looked_at: a description of the labels that none of these rows has; empty if there are none.
    """

    positions: Sequence[int]
    not_looked_at: str

    @classmethod
    def of(cls, rows: Rows, ignore_index: int, special: Collection[int]) -> "RareRows":
        """Choose rows that cover the values of each column, rarest first, labels before other columns.

        Args:
            ignore_index: the label that the loss is known to ignore.
            special: the token ids to cover if the labels come from a vocabulary.
        """
        names = _columns(rows.fetch([0])[0])
        if not names:
            return cls((), "")
        search, unseen = _Search.of(rows), []
        for name in names:
            column = search.column(name)
            if column is None:
                continue
            values = column.values(search.lengths)
            if not is_label(name):
                search.cover(column, values, min(_MOST_KINDS, search.n_rows // 2))
                continue
            values.pop(ignore_index, None)
            if missing := search.cover(column, values, _MOST_LABELS, special):
                unseen.append(f"{missing:,} of {len(values):,} {'label' if name == TARGETS else repr(name)} values")
            if column.numbers.size > search.n_rows and len(values) <= _FEW_LABELS:
                search.add(len(values))  # enough rows to separate the weights of labels that share a row
        if (search.n_rows < len(rows) or rows.are_endless) and any(map(is_label, names)):
            unseen.append(f"labels of rows after the first {search.n_rows:,}")
        positions = [*search.chosen[:1], *sorted(search.chosen[1:], key=lambda row: search.lengths[row])]
        return cls(positions, " and ".join(unseen))


@dataclass(frozen=True)
class _Search:
    """The rows to choose from, and those chosen so far.

    Attributes:
        table: the rows as a table, if their columns can be read without fetching rows; else None.
        fetched: the rows, if there is no table.
    """

    table: Dataset | None
    fetched: Sequence[Row]
    lengths: np.ndarray
    chosen: list[int]

    @classmethod
    def of(cls, rows: Rows) -> "_Search":
        if rows.in_memory and isinstance(rows.source, Dataset):
            return cls(rows.table, (), np.array(rows.lengths() or [1] * len(rows)), [])
        fetched = rows.fetch(range(min(len(rows), _FETCHED_ROWS if rows.in_memory else _LAZY_ROWS)))
        lengths = rows.lengths(range(len(fetched))) or [length_of(row) for row in fetched]
        return cls(None, fetched, np.array(lengths), [])

    @property
    def n_rows(self) -> int:
        return len(self.lengths)

    def column(self, name: str) -> "_Column | None":
        """Return the numbers of a column; None if it holds anything else, or too many."""
        if self.table is not None:
            return _Column.of_table(self.table, name)
        are_mappings = isinstance(self.fetched[0], Mapping)
        return _Column.of_values(
            [row.get(name) for row in self.fetched] if are_mappings else [y for _, y in self.fetched]
        )

    def cover(self, column: "_Column", values: Values, most: int, special: Collection[int] = ()) -> int:
        """Choose rows for the values that no chosen row has yet, and return how many values are still missing.

        If nothing was chosen yet, begin with the most frequent value. Then go from the rarest value up.

        Args:
            most: the most values to cover. If there are more, cover only the special ones.
        """
        if len(values) > most:
            values = {value: found for value, found in values.items() if value is None or value in special}
        if values and not self.chosen:
            self.chosen.append(max(values.values())[1])
        seen = column.values_of(self.chosen)
        for value, (_, row) in sorted(values.items(), key=lambda item: item[1]):
            if len(self.chosen) <= _MOST_ROWS and value not in seen:
                self.chosen.append(row)
                seen |= column.values_of([row])
        return len(values.keys() - seen)

    def add(self, n_rows: int) -> None:
        """Choose more rows at random, from the shorter half, until there are `n_rows`."""
        shorter = np.argsort(self.lengths, kind="stable")[: (self.n_rows + 1) // 2]
        others = [row for row in np.random.RandomState(0).permutation(shorter).tolist() if row not in self.chosen]
        self.chosen.extend(others[: max(0, n_rows - len(self.chosen))])


@dataclass(frozen=True)
class _Column:
    """The numbers of a column, row after row; those of row n begin at `starts[n]`."""

    numbers: np.ndarray
    starts: np.ndarray

    @classmethod
    def of_values(cls, values: Sequence[Any]) -> "_Column | None":
        """Return the column; None if a row holds anything but numbers, or if there are too many numbers."""
        if len({type(value) for value in values}) == 1 and isinstance(values[0], int | float):
            return cls(np.array(values), np.arange(len(values) + 1))  # one conversion for all, which is faster
        arrays = [_numbers(value) for value in values]
        known = [array.ravel() for array in arrays if array is not None and array.dtype.kind in "iufb"]
        if len(known) < len(arrays) or sum(array.size for array in known) > _MOST_NUMBERS:
            return None
        return cls(np.concatenate(known), np.cumsum([0, *(array.size for array in known)]))

    @classmethod
    def of_table(cls, table: Dataset, name: str) -> "_Column | None":
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
        by_length = np.argsort(lengths, kind="stable")
        ranks = np.empty_like(by_length)
        ranks[by_length] = np.arange(len(by_length))
        table = pyarrow.table({"value": self.numbers, "rank": np.repeat(ranks, np.diff(self.starts))})
        found = table.group_by("value", use_threads=False).aggregate([("rank", "count"), ("rank", "min")])
        columns = (found[name].to_pylist() for name in ("value", "rank_count", "rank_min"))
        return {_key(value): (count, int(by_length[rank])) for value, count, rank in zip(*columns, strict=True)}

    def values_of(self, rows: Sequence[int]) -> set[Any]:
        return {_key(v) for row in rows for v in self.numbers[self.starts[row] : self.starts[row + 1]].tolist()}


def _columns(row: Row) -> list[str]:
    """Return the names of the columns of whole numbers that may tell kinds of rows apart, labels first."""
    if not isinstance(row, Mapping):
        return [TARGETS] if _is_whole(_numbers(row[1])) else []
    names = [name for name in row if not is_tokens_column(name, row)]
    labels = [name for name in names if is_label(name)]
    sizes = {(), *(np.shape(row[name]) for name in labels)}
    others = [name for name in names if name not in labels and np.shape(row[name]) in sizes]
    return [name for name in (*labels, *others) if _is_whole(_numbers(row[name]))]


def _is_whole(numbers: np.ndarray | None) -> bool:
    return numbers is not None and numbers.dtype.kind in "iufb" and not np.any(numbers % 1 > 0)


def _numbers(value: Any) -> np.ndarray | None:
    if isinstance(value, Tensor):
        return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).cpu().numpy()
    try:
        return np.asarray(value)
    except ValueError:  # lists of unequal lengths
        return None


def _key(value: Any) -> Any:
    return value if value == value else None  # NaN does not equal itself
