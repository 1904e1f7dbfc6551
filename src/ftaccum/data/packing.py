"""Rows one behind the other in one long sequence, without padding."""

from collections.abc import Mapping

from transformers import DataCollatorWithFlattening

from ..objective.item_counts import Batch
from .collator import column_name
from .row import Row


class PackingCollator:
    """Lays the rows of a micro-batch one behind the other, in a batch of one row.

    `position_ids` start anew with each row; by them a model of Transformers keeps rows from attending to each other.
    The first label of each row is ignored: after the shift it would be predicted from the row before.
    A row without tokens gets one that nothing is predicted from: it has its place, and a label for it to ignore.
    """

    def __init__(self, ignore_index: int) -> None:
        self._nothing = {"input_ids": [0], "labels": [ignore_index]}
        self._flatten = DataCollatorWithFlattening(return_tensors="pt", separator_id=ignore_index)

    def __call__(self, rows: list[Row]) -> Batch:
        return self._flatten([self._columns(row) for row in rows])

    def _columns(self, row: Row) -> Row:
        if not isinstance(row, Mapping):
            raise ValueError("it has no columns")
        columns = {column_name(key): value for key, value in row.items()}
        missing = {"input_ids", "labels"} - columns.keys()
        if missing:
            raise ValueError(f"it has no column {missing.pop()!r}")
        if not len(columns["input_ids"]):
            return self._nothing
        return {name: columns[name] for name in ("input_ids", "labels")}
