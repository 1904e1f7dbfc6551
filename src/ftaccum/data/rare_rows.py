"""The choice of rows that cover every value of the labels, and of other columns with few distinct values."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..objective.model_forward import is_label
from ..objective.own_rules import TARGETS, named_targets
from ..objective.prefixed import is_tokens_column
from .dataset import Rows
from .number_columns import NumberColumn, SearchedRows, Values, numbers_of, readable_rows
from .row import Row

_MOST_ROWS = 64
_RESERVED = 16  # of these, for columns other than labels; the most for such columns of measurements
_FIRST_ROWS = 8  # rows that show which columns to search
_MOST_CLASSES, _MOST_TOKENS, _MOST_KINDS = 1000, 64, 64  # distinct values of labels, and of other columns
_VERY_FEW = 3  # values, such as 0, 1 and one for "unknown"; rows are chosen by how often each occurs in them
_FEW_LABELS = 32  # label values; up to this number, one more row may be chosen for each


@dataclass(frozen=True)
class LabelKind:
    """The kind of labels: tokens, or classes and numbers.

    Attributes:
        are_tokens: whether they are tokens that a language model predicts with its own loss.
        special: the special tokens, which are covered even if there are too many values.
    """

    are_tokens: bool = False
    special: Collection[int] = ()

    @property
    def most(self) -> int:
        """The most values to cover. A model's own loss hardly has a rule for any token but special ones."""
        return _MOST_TOKENS if self.are_tokens else _MOST_CLASSES


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
    def of(cls, rows: Rows, ignore_index: int, label_kind: LabelKind) -> "RareRows":
        """Choose rows that cover the values of each column, rarest first, labels before other columns.

        Args:
            ignore_index: the label that the loss is known to ignore.
        """
        labels, others = _columns(readable_rows(rows, _FIRST_ROWS))
        if not (labels or others):
            return cls((), "")
        search, unseen = _Search(SearchedRows.of(rows)), []
        kinds = {
            name: each for name in labels if (each := search.labels(name, ignore_index, label_kind.most)) is not None
        }
        found = [each for name, is_flag in others.items() if (each := search.flags(name, is_flag=is_flag)) is not None]
        found.sort(key=lambda each: len(each.values))
        reserved = min(_RESERVED, sum(len(each.values) for each in found))
        for each in kinds.values():
            search.cover(each, _MOST_ROWS - reserved, label_kind.special)
        for each in [each for each in found if not each.are_measurements]:
            search.cover(each, _MOST_ROWS)
        for each in [*kinds.values(), *found]:
            search.cover_numbers(each)
        most = min(_MOST_ROWS, len(search.chosen) + _RESERVED)
        for each in [each for each in found if each.are_measurements]:
            search.cover(each, most)
        for name, each in kinds.items():
            missing = search.cover(each, _MOST_ROWS, label_kind.special)
            if missing and not each.are_measurements:
                unseen.append(
                    f"{missing:,} of {len(each.values):,} {'label' if name == TARGETS else repr(name)} values"
                )
            if each.column.numbers.size > len(search.rows) and len(each.values) <= _FEW_LABELS:
                search.add(len(each.values))  # enough rows to separate the weights of labels that share a row
        is_part = len(search.rows) < len(rows) or rows.are_endless
        if is_part and not all(kinds[name].are_measurements for name in labels if name in kinds):
            unseen.append(f"labels of rows after the first {len(search.rows):,}")
        positions = [*search.chosen[:1], *sorted(search.chosen[1:], key=lambda row: search.rows.lengths[row])]
        return cls(positions, " and ".join(unseen))


@dataclass(frozen=True)
class _Kinds:
    """The values of a column that rows are chosen for.

    Attributes:
        are_measurements: whether all other values of the column are measurements.
        most: the most values to cover. If there are more, only the special ones are.
        ignored: the label that the loss is known to ignore, if a row has it. It is covered first: a loss of numbers,
            such as a squared error, does not ignore it.
    """

    column: NumberColumn
    values: Values
    are_measurements: bool = False
    most: int = _MOST_CLASSES
    ignored: Values = field(default_factory=dict)


@dataclass(frozen=True)
class _Search:
    """The rows to choose from, and those chosen so far."""

    rows: SearchedRows
    chosen: list[int] = field(default_factory=list)

    def labels(self, name: str, ignore_index: int, most: int) -> _Kinds | None:
        """Return up to `most` values to cover of a column of labels; None if it holds anything but numbers."""
        column = self.rows.column(name)
        found = None if column is None else self._kinds(column, most)
        if found is None or ignore_index not in found.values:
            return found
        return replace(found, ignored={ignore_index: found.values.pop(ignore_index)})

    def flags(self, name: str, *, is_flag: bool | None) -> _Kinds | None:
        """Return the values to cover of another column; None if there are none.

        Args:
            is_flag: whether the column must be one of flags, 0 and 1, or of NaN and infinities only; None for any.
        """
        column = self.rows.column(name)
        if column is None:
            return None
        if is_flag is None:
            found = self._kinds(column, min(_MOST_KINDS, len(self.rows) // 2))
        elif is_flag and np.isin(column.numbers, (0, 1)).all():
            found = _Kinds(column, column.values(self.rows.lengths))
        else:
            found = _Kinds(column, column.nonfinite(self.rows.lengths), are_measurements=True)
        return found if 0 < len(found.values) <= found.most else None

    def _kinds(self, column: NumberColumn, most: int) -> _Kinds:
        values = {} if column.has_fractions else column.values(self.rows.lengths)
        if column.has_fractions or (column.numbers.dtype.kind == "f" and len(values) > most):
            return _Kinds(column, column.of_measurement(self.rows.lengths), are_measurements=True)
        return _Kinds(column, values, most=most)

    def cover(self, kinds: _Kinds, most_rows: int, special: Collection[int] = ()) -> int:
        """Choose rows for the values that no chosen row has yet, and return how many values are still missing.

        If nothing was chosen yet, begin with the most frequent value. Then go from the rarest value up.

        Args:
            most_rows: the most rows to choose in all, besides the first.
            special: the values to cover if there are too many.
        """
        column, values = kinds.column, kinds.values
        if len(values) > kinds.most:
            values = {value: found for value, found in values.items() if value is None or value in special}
        frequent = values or (kinds.values if kinds.ignored else {})
        if frequent and not self.chosen:
            are_measurements, lengths = kinds.are_measurements, self.rows.lengths
            self.chosen.append(column.typical_row(lengths) if are_measurements else max(frequent.values())[1])
        seen = column.values_of(self.chosen)
        ignored = kinds.ignored if self.chosen else {}
        for value, (_, row) in [*ignored.items(), *sorted(values.items(), key=lambda item: item[1])]:
            if len(self.chosen) <= most_rows and value not in seen:
                self.chosen.append(row)
                seen |= column.values_of([row])
        return len(values.keys() - seen)

    def cover_numbers(self, kinds: _Kinds) -> None:
        """Choose rows that have each value of a column rarely and often, if it has very few values."""
        if self.chosen and not kinds.are_measurements and len(kinds.values) + len(kinds.ignored) <= _VERY_FEW:
            unlike = [row for row in kinds.column.unlike_rows(self.rows.lengths) if row not in self.chosen]
            self.chosen.extend(unlike[: max(0, _MOST_ROWS - len(self.chosen))])

    def add(self, n_rows: int) -> None:
        """Choose more rows at random, from the shorter half, until there are `n_rows`."""
        shorter = np.argsort(self.rows.lengths, kind="stable")[: (len(self.rows) + 1) // 2]
        others = [row for row in np.random.RandomState(0).permutation(shorter).tolist() if row not in self.chosen]
        self.chosen.extend(others[: max(0, n_rows - len(self.chosen))])


def _columns(rows: Sequence[Row]) -> tuple[list[str], dict[str, bool | None]]:
    """Return the names of the labels, and of other columns of numbers that may tell kinds of rows from each other.

    For each other column, the second result is None if it has a number per row or the shape of the labels, and else
    whether it may be one of flags.

    Args:
        rows: the first rows.
    """
    row = rows[0]
    if not isinstance(row, Mapping):
        return [name for name, each in named_targets(row[1]).items() if _are_numbers(numbers_of(each))], {}
    arrays: dict[str, list[np.ndarray]] = {}
    for name in row:
        found = [numbers_of(each.get(name)) for each in rows]
        if not is_tokens_column(name, row) and all(map(_are_numbers, found)):
            arrays[name] = [array for array in found if array is not None]
    labels = [name for name in arrays if is_label(name)]
    sizes = {(), *(arrays[name][0].shape for name in labels)}
    return labels, {
        name: None if each[0].shape in sizes else all(np.isin(array, (0, 1)).all() for array in each)
        for name, each in arrays.items()
        if name not in labels
    }


def _are_numbers(numbers: np.ndarray | None) -> bool:
    return numbers is not None and numbers.dtype.kind in "iufb"
