"""Check the columns of all rows of a table or a list before training."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset

from ..errors import DataError
from ..objective.prefixed import ids_of
from .columns import Along, ColumnRules, Columns, check_presence
from .dataset import Rows
from .iterable import StreamRows
from .values import OddRowError, column_name

_BATCH = 10_000  # rows of a table to read at a time, if values must be read


def look_at_columns(
    rows: Rows, rules: ColumnRules, positions: Sequence[int], like: Columns | None = None
) -> Columns | None:
    """Return the columns of rows; None if rows are tuples.

    Check all rows of a list or a table, and the first ones of a stream. Other rows are checked when they are loaded.

    Args:
        positions: the rows to derive the columns from.
        like: the columns that the rows must have, if they are known.

    Raises:
        DataError: if a row has other columns than most rows, or a column of another length. It names the row.
    """
    few = rows.fetch(positions)
    if not all(isinstance(row, Mapping) for row in few):
        return None
    try:
        every = _all_of(rows)
        if every is not None:
            every.check_presence(rules)
        try:
            columns = Columns.of(few, rules)
        except OddRowError as error:
            error.place = positions[error.place]
            raise
        if like is not None and (missing := sorted(like.keys.keys() - columns.keys.keys())):
            raise DataError(
                f"`{rows.argument}` lacks the columns {missing} that `train_data` has. Give it the same columns."
            )
        if every is not None:
            _check_lengths(rows, every, like or columns)
    except OddRowError as error:
        raise DataError(
            f"In `{rows.argument}`, {rows.name_of(error.place)} cannot be batched: {error}. {error.remedy}"
        ) from error
    return columns


def _check_lengths(rows: Rows, every: "_List | _Table", columns: Columns) -> None:
    """Check the first dimension of every column.

    Raises:
        OddRowError: for the first row with a column that does not have the length of its tokens, or of other rows.
    """
    if not len(_odd(every, columns, exact=False)) or not len(odd := _odd(every, columns, exact=True)):
        return
    place = int(odd[0])
    try:
        columns.tensors(rows.fetch([place]))
    except OddRowError as error:
        raise OddRowError(place, f"{error} ({len(odd)} of {len(rows)} rows)", error.remedy) from error


def _odd(every: "_List | _Table", columns: Columns, *, exact: bool) -> np.ndarray:
    """Return the places of rows with a column whose first dimension has another size than required.

    Args:
        exact: whether to leave out other rows of the same table.
    """
    lengths = {name: every.lengths(key, exact=exact) for name, key in columns.keys.items()}
    base, dim = columns.token_base or ("", 0)
    known: dict[Along, np.ndarray | None] = {Along.TARGETS: lengths.get("labels"), Along.NOTHING: None}
    counts_first = dim % len(columns.sizes[base]) == 0 if base else False  # for multiple choice, choices come first
    known[Along.TOKENS] = lengths[base] if counts_first else None
    odd = np.zeros(0, dtype=np.int64)
    for name, found in lengths.items():
        sizes = columns.sizes[name]
        wanted = known[sizes[0]] if sizes and isinstance(sizes[0], Along) else sizes[0] if sizes else None
        if sizes == (Along.NOTHING,):
            wanted = lengths.get(ids_of(name) or "")
        if found is not None and wanted is not None:
            odd = np.union1d(odd, np.flatnonzero(found != wanted))
    return odd


def _all_of(rows: Rows) -> "_List | _Table | None":
    if isinstance(rows, StreamRows) or isinstance(rows.source, list):
        return _List(rows)
    computed = isinstance(rows.source, Dataset) and rows.source.format["type"] == "custom"
    return _Table(rows) if isinstance(rows.source, Dataset) and not computed else None


class _List:
    """Rows in memory."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows.fetch(range(len(rows)))
        for place, row in enumerate(self._rows):
            if isinstance(row, tuple):
                raise OddRowError(place, "it is a tuple, but other rows are dicts")

    def check_presence(self, rules: ColumnRules) -> None:
        """Raise OddRowError if some rows lack a column that others have."""
        for key in dict.fromkeys(itertools.chain.from_iterable(self._rows)):
            lacking = [place for place, row in enumerate(self._rows) if row.get(key) is None]
            if lacking and len(lacking) < len(self._rows):
                value = next(row[key] for row in self._rows if row.get(key) is not None)
                if rules.takes(column_name(key), value):
                    check_presence(key, lacking, len(self._rows))

    def lengths(self, key: str, *, exact: bool) -> np.ndarray | None:  # noqa: ARG002
        """Return the length of each row's value; None if values have no length."""
        try:
            return np.fromiter((len(row[key]) for row in self._rows), dtype=np.int64, count=len(self._rows))
        except TypeError:
            return None


class _Table:
    """Rows of a table. Unless they are faulty, only their offsets and their marks of missing values are read."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def check_presence(self, rules: ColumnRules) -> None:
        """Raise OddRowError if some rows lack a column that others have."""
        source = self._rows.source
        for key in source.format["columns"]:
            if not source.data.column(key).null_count:
                continue
            lacking = np.flatnonzero(np.concatenate([pa.compute.is_null(part).to_numpy() for part in self._read(key)]))
            if 0 < len(lacking) < len(self._rows):
                having = int(np.setdiff1d(np.arange(len(self._rows)), lacking)[0])
                if rules.takes(column_name(key), self._rows.fetch([having])[0][key]):
                    check_presence(key, lacking.tolist(), len(self._rows))

    def lengths(self, key: str, *, exact: bool) -> np.ndarray | None:
        """Return the length of each row's value; None if values have no length.

        Args:
            exact: whether to leave out other rows of the same table. For this, values must be read.
        """
        column = self._rows.source.data.column(key)
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            return None
        parts = self._read(key) if exact else [column]
        return np.concatenate([pa.compute.list_value_length(part).fill_null(0).to_numpy() for part in parts])

    def _read(self, key: str) -> Iterator[pa.ChunkedArray]:
        table = self._rows.table.select_columns([key]).with_format("arrow")
        return (part[key] for part in table.iter(_BATCH))
