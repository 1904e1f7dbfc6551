"""The class of each row, and the number of labels of each class."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from torch import Tensor

from ..errors import DataError, shown
from ..objective.item_counts import targets_of
from .collator import RowCollator
from .dataset import Rows
from .labels import LABELS

_LISTED = 6  # classes whose sizes are listed one by one
_AT_ONCE = 256  # rows to read together, if they must be computed


def row_classes(rows: Rows, ignore_index: int) -> tuple[int, ...]:
    """Return a number for the class of each row, from 0 on in order of first appearance; -1 if its label is ignored.

    Raises:
        DataError: if a row has no label, or one that is not an integer, a string or a boolean. It names the row.
    """
    numbers: dict[Any, int] = {}
    found = []
    for position, value in enumerate(_labels(rows)):
        label = value.item() if isinstance(value, Tensor | np.ndarray | np.generic) and not np.ndim(value) else value
        if not isinstance(label, int | str):
            held = "no label" if label is None else f"the label {shown(label)}"
            raise DataError(
                f"`sampler` is 'balanced', which draws rows by their class, but {rows.name_of(position)} of "
                f"`{rows.argument}` has {held}. Give each row one label that is an integer, a string or a boolean, in "
                "a column `label` or `labels`, or leave `sampler` out."
            )
        found.append(-1 if label == ignore_index else numbers.setdefault(label, len(numbers)))
    return tuple(found)


def describe_draws(classes: Sequence[int]) -> str:
    """Return the banner's line about balanced draws from rows of these classes."""
    sizes = np.bincount(np.asarray(classes) + 1)[1:].tolist()
    few = ", ".join(map(str, sizes)) if len(sizes) <= _LISTED else f"{min(sizes)} to {max(sizes)}"
    return f"Sampler: {len(classes)} draws per epoch, evenly from {len(sizes)} classes ({few} rows), with replacement"


def count_labels(rows: Rows, row_collator: RowCollator, *, are_collated: bool) -> Counter[int]:
    """Return how often the rows have each label, ignored ones included.

    Args:
        are_collated: whether the user's collator makes the labels, so that every row must be collated.
    """
    name = _label_name(rows)
    column = None if are_collated or name is None else rows.column(name)
    counts: Counter[int] = Counter()
    if isinstance(column, pa.ChunkedArray):
        for part in column.chunks:
            while pa.types.is_list(part.type) or pa.types.is_large_list(part.type):
                part = pa.compute.list_flatten(part)
            values, numbers = part.value_counts().flatten()
            counts.update(dict(zip(values.to_pylist(), numbers.to_pylist(), strict=True)))
    elif column is not None:
        for value in column:
            counts.update(np.ravel(value).tolist())
    else:
        for positions in _chunks(len(rows)):
            targets = targets_of(row_collator.seeded(rows, positions, 0))
            counts.update([] if targets is None else targets.flatten().tolist())
    return counts


def _label_name(rows: Rows) -> str | None:
    """Return the name of the label column, as `Rows.column` takes it; None if the first row has no label."""
    row = rows.fetch([0])[0]
    if isinstance(row, tuple):
        return "targets"
    return next((name for name in LABELS if row.get(name) is not None), None)


def _labels(rows: Rows) -> Iterable[Any]:
    """Yield the label of each row; None for a row without one."""
    name = _label_name(rows)
    column = None if name is None else rows.column(name)
    if column is not None:
        return column.to_pylist() if isinstance(column, pa.ChunkedArray) else column
    fetched = (row for positions in _chunks(len(rows)) for row in rows.fetch(positions))
    return (row.get(name) if isinstance(row, Mapping) else row[1] for row in fetched)


def _chunks(n_rows: int) -> Iterator[range]:
    for start in range(0, n_rows, _AT_ONCE):
        yield range(start, min(start + _AT_ONCE, n_rows))
