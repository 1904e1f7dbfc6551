"""Concatenate rows into one long sequence, without padding."""

from collections.abc import Mapping

import torch
from transformers import DataCollatorWithFlattening

from ..objective.item_counts import Batch
from .row import Row
from .values import OddRowError, as_tensor, column_name

_LEAVE_OUT = "Leave out `padding_free`."


class PackingCollator:
    """A collator that concatenates the rows of a micro-batch into a batch of one row.

    `position_ids` restart with each row. By them, Transformers' models keep rows from attending to each other.
    The first label of each row is ignored: after the shift, it would be predicted from the row before.
    A row without tokens gets one token with an ignored label, so that it keeps its place in the batch.
    """

    def __init__(self, ignore_index: int) -> None:
        self._nothing = {"input_ids": [0], "labels": [ignore_index]}
        self._flatten = DataCollatorWithFlattening(return_tensors="pt", separator_id=ignore_index)

    def __call__(self, rows: list[Row]) -> Batch:
        """Return the batch of some rows.

        Raises:
            OddRowError: for a row that cannot be concatenated with others.
        """
        return self._flatten([self._columns(row, place) for place, row in enumerate(rows)])

    def _columns(self, row: Row, place: int) -> Row:
        if not isinstance(row, Mapping):
            raise OddRowError(place, "it has no columns")
        columns = {column_name(key): value for key, value in row.items()}
        for name in ("input_ids", "labels"):
            if name not in columns:
                raise OddRowError(place, f"it has no column {name!r}")
        n_tokens, n_labels = len(columns["input_ids"]), len(columns["labels"])
        if n_tokens != n_labels:
            raise OddRowError(place, f"it has {n_tokens} tokens but {n_labels} `labels`")
        if not n_tokens:
            return self._nothing
        plain = {"attention_mask": torch.ones(n_tokens), "position_ids": torch.arange(n_tokens)}
        for name in plain.keys() & columns.keys():
            if not torch.equal(as_tensor(columns[name]).to(plain[name].dtype), plain[name]):
                raise OddRowError(
                    place,
                    f"`padding_free` sets `attention_mask` to ones and `position_ids` to 0, 1, 2, …, but its `{name}` "
                    "has other values",
                    _LEAVE_OUT,
                )
        return {name: columns[name] for name in ("input_ids", "labels")}
