"""The choice of rows that cover every value of the labels, and of other columns with few distinct values."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..objective.model_forward import is_label
from ..objective.own_rules import TARGETS
from ..objective.prefixed import is_tokens_column
from .dataset import Rows
from .number_columns import NumberColumn, SearchedRows, Values, numbers_of
from .row import Row

_MOST_ROWS = 64
_MOST_LABELS, _MOST_KINDS = 1000, 64  # distinct values of labels, and of other columns; a vocabulary has more
_FEW_LABELS = 32  # label values; up to this number, one more row may be chosen for each


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
        search, unseen = _Search(SearchedRows.of(rows)), []
        for name in names:
            column = search.rows.column(name)
            if column is None:
                continue
            values = column.values(search.rows.lengths)
            if not is_label(name):
                search.cover(column, values, min(_MOST_KINDS, len(search.rows) // 2))
                continue
            values.pop(ignore_index, None)
            if missing := search.cover(column, values, _MOST_LABELS, special):
                unseen.append(f"{missing:,} of {len(values):,} {'label' if name == TARGETS else repr(name)} values")
            if column.numbers.size > len(search.rows) and len(values) <= _FEW_LABELS:
                search.add(len(values))  # enough rows to separate the weights of labels that share a row
        if (len(search.rows) < len(rows) or rows.are_endless) and any(map(is_label, names)):
            unseen.append(f"labels of rows after the first {len(search.rows):,}")
        positions = [*search.chosen[:1], *sorted(search.chosen[1:], key=lambda row: search.rows.lengths[row])]
        return cls(positions, " and ".join(unseen))


@dataclass(frozen=True)
class _Search:
    """The rows to choose from, and those chosen so far."""

    rows: SearchedRows
    chosen: list[int] = field(default_factory=list)

    def cover(self, column: NumberColumn, values: Values, most: int, special: Collection[int] = ()) -> int:
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
        shorter = np.argsort(self.rows.lengths, kind="stable")[: (len(self.rows) + 1) // 2]
        others = [row for row in np.random.RandomState(0).permutation(shorter).tolist() if row not in self.chosen]
        self.chosen.extend(others[: max(0, n_rows - len(self.chosen))])


def _columns(row: Row) -> list[str]:
    """Return the names of the columns of whole numbers that may tell kinds of rows apart, labels first."""
    if not isinstance(row, Mapping):
        return [TARGETS] if _is_whole(numbers_of(row[1])) else []
    names = [name for name in row if not is_tokens_column(name, row)]
    labels = [name for name in names if is_label(name)]
    sizes = {(), *(np.shape(row[name]) for name in labels)}
    others = [name for name in names if name not in labels and np.shape(row[name]) in sizes]
    return [name for name in (*labels, *others) if _is_whole(numbers_of(row[name]))]


def _is_whole(numbers: np.ndarray | None) -> bool:
    return numbers is not None and numbers.dtype.kind in "iufb" and not np.any(numbers % 1 > 0)
