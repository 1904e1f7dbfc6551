"""Choose rows with rare label values or columns for the verified window, where errors in them show."""

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor

from ...data.dataset import Rows
from ...objective.model_forward import is_label
from ...planning.micro_batches import RowIndices

Traits = Sequence[Sequence[int]]  # for each label value or column: the positions of the rows that have it

_MOST_ROWS = 100_000  # rows to inspect
_BATCH = 1000  # rows of a table to read at a time
_MOST_VALUES = 1000  # distinct values of a label column; more are taken for token ids or measurements
_SHARE = 4  # one in so many rows of a window may be replaced


def traits_of(rows: Rows) -> Traits:
    """Return the positions of the rows with each label value, and with each column missing, present or empty.

    Inspect only rows in memory, and at most 100,000 of them.
    """
    by_kind: dict[str, dict[Hashable, list[int]]] = {}
    n_rows, many = 0, set[str]()
    for position, row in enumerate(_read(rows)):
        n_rows += 1
        for kind, values in _traits_of_row(row, many):
            known = by_kind.setdefault(kind, {})
            for value in values:
                known.setdefault(value, []).append(position)
            if len(known) > _MOST_VALUES:
                many.add(kind)
                known.clear()
    present = by_kind.get("has", {}).values()
    lacking = [sorted({*range(n_rows)}.difference(positions)) for positions in present if len(positions) < n_rows]
    # If most rows have different values, no value is rare.
    known_values = [known for known in by_kind.values() if len(known) <= max(2, n_rows // 2)]
    return [*(positions for known in known_values for positions in known.values()), *lacking]


def rarest(traits: Traits, n_rows: int, known: Collection[int] = ()) -> list[int]:
    """Return up to `n_rows` rows with traits that the known rows lack, rarest first."""
    chosen, covered = list[int](), set(known)
    for positions in sorted(traits, key=len):
        if len(chosen) == n_rows:
            break
        if covered.isdisjoint(positions):
            chosen.append(positions[0])
            covered.add(positions[0])
    return chosen


def with_rare_rows(window: RowIndices, traits: Traits, seed: int) -> RowIndices:
    """Return a window in which rare rows replace up to a quarter of its rows, which are drawn by the seed."""
    chosen = rarest(traits, max(1, len(window) // _SHARE) if len(window) > 1 else 0, window)
    places = np.random.RandomState(seed).permutation(len(window))[: len(chosen)]
    exchanged = dict(zip(places.tolist(), chosen, strict=True))
    return tuple(exchanged.get(place, position) for place, position in enumerate(window))


def _read(rows: Rows) -> Iterator[Any]:
    """Yield the rows. Rows of a table have only the columns that are labels or have gaps."""
    positions = range(min(len(rows), _MOST_ROWS))
    if isinstance(rows.source, Dataset):
        table = rows.subset(positions).table
        columns = [n for n in table.column_names if is_label(n) or table.data.column(n).null_count]
        if columns:
            for batch in table.select_columns(columns).with_format("arrow").iter(_BATCH):
                yield from batch.to_pylist()
    elif isinstance(rows.source, list):
        yield from rows.fetch(positions)


def _traits_of_row(row: Any, without: Collection[str]) -> Iterator[tuple[str, set[Hashable]]]:
    if not isinstance(row, Mapping):
        if "target" not in without:
            yield "target", _values(row[1])
        return
    yield "has", {name for name, value in row.items() if value is not None}
    yield "empty", {name for name, value in row.items() if _is_empty(value)}
    for name, value in row.items():
        if is_label(name) and (kind := f"label {name}") not in without:
            yield kind, _values(value)


def _is_empty(value: Any) -> bool:
    return 0 in value.shape if isinstance(value, Tensor | np.ndarray) else isinstance(value, list | tuple) and not value


def _values(label: Any) -> set[Hashable]:
    """Return the distinct values of a label.

    For floating-point labels, return their shape. If they are whole numbers, as in multi-label classification, also
    return each number with its position.
    """
    try:
        values = np.asarray(label.tolist() if isinstance(label, Tensor) else label)
    except ValueError:  # lists of unequal lengths
        return set()
    if values.dtype.kind in "iubU":
        return set(values.reshape(-1).tolist())
    if values.dtype.kind != "f":
        return set()
    are_whole = np.array_equal(values, np.round(values))
    return {values.shape, *(enumerate(values.reshape(-1).tolist()) if are_whole else ())}
