"""Label values and columns that no window had before."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..objective.item_counts import targets_of
from .loader import MicroBatch

_MOST = 1000  # label values, beyond which they are a vocabulary


class SeenValues:
    """The label values and columns of the windows so far, on this process."""

    def __init__(self) -> None:
        self._columns: set[str] = set()
        self._labels: set[int] = set()

    def add(self, micro_batches: Iterable[MicroBatch]) -> bool:
        """Add those of a window, and return whether any is new.

        Labels that are no whole numbers, or have more than 1,000 values, are left out.
        """
        columns: set[str] = set()
        labels: set[int] = set()
        for micro in micro_batches:
            if isinstance(micro.batch, Mapping):
                columns |= set(map(str, micro.batch))
            targets = None if micro.batch is None else targets_of(micro.batch)
            if isinstance(targets, Tensor) and not targets.is_floating_point() and len(self._labels) <= _MOST:
                labels |= set(targets.unique().tolist())
        is_new = bool(columns - self._columns or (labels - self._labels and len(self._labels) <= _MOST))
        self._columns |= columns
        self._labels |= labels
        return is_new

    def state_dict(self) -> dict[str, Any]:
        return {"columns": sorted(self._columns), "labels": sorted(self._labels)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._columns, self._labels = set(state_dict["columns"]), set(state_dict["labels"])
