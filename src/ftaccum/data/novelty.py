"""The values that tell kinds of rows apart, such as labels and flags, and which of them are new in a window."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..objective.item_counts import Batch
from ..objective.prefixed import is_tokens_column
from .loader import MicroBatch

# A column with more distinct values than this, with one value per row or per token, is a vocabulary or a measurement.
_MOST_OF_ROWS, _MOST_OF_TOKENS = 1000, 64
_LARGEST = 1 << 16  # the most numbers of a micro-batch's column to look at


@dataclass(frozen=True)
class ColumnKinds:
    """The values of one column in a micro-batch.

    Attributes:
        values: the distinct values, including None if a row has no labels.
        n_numbers: the number of elements of the column.
        most: the most distinct values with which a column tells kinds of rows apart.
    """

    values: set[Any]
    n_numbers: int
    most: int


def kinds_of(batch: Batch) -> dict[str, ColumnKinds]:
    """Return the distinct values of the labels, flags and similar columns of a collated batch, by column.

    Leave out token ids, their masks, and columns of more than two dimensions. A row of several numbers that all equal
    the column's smallest one, as the labels of an ignored row do, counts as a separate kind.
    """
    columns = batch.items() if isinstance(batch, Mapping) else [] if batch is None else [("targets", batch[1])]
    found, names = {}, {name for name, _ in columns}
    for name, values in columns:
        if not isinstance(values, Tensor) or is_tokens_column(name, names) or not 1 <= values.ndim <= 2:
            continue
        if values.is_complex() or values.numel() > _LARGEST or not values.numel():
            continue
        is_of_tokens = values.ndim == 2 and values.shape[1] > 1
        distinct = set(values.unique().tolist())
        if is_of_tokens and bool((values == values.min()).all(1).any()):
            distinct.add(None)
        most = _MOST_OF_TOKENS if is_of_tokens else _MOST_OF_ROWS
        found[str(name)] = ColumnKinds(distinct, values.numel(), most)
    return found


class SeenValues:
    """The values in the windows so far, on this process."""

    def __init__(self) -> None:
        self._values: dict[str, set[Any]] = {}
        self._n_numbers: Counter[str] = Counter()

    def add(self, micro_batches: Iterable[MicroBatch]) -> bool:
        """Add the values of a window, and return whether any is new.

        A column in which most numbers are distinct is a measurement. Its values never count as new.
        """
        is_new = False
        for micro in micro_batches:
            for name, kinds in kinds_of(micro.batch).items():
                seen, n_numbers = self._values.setdefault(name, set()), self._n_numbers[name]
                are_kinds = len(seen) <= kinds.most and 2 * len(seen) <= n_numbers
                is_new |= bool(kinds.values - seen) and (are_kinds or not n_numbers)
                if len(seen) <= kinds.most:
                    seen |= kinds.values
                self._n_numbers[name] += kinds.n_numbers
        return is_new

    def state_dict(self) -> dict[str, Any]:
        values = {name: list(values) for name, values in self._values.items()}
        return {"values": values, "n_numbers": dict(self._n_numbers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._values = {name: set(values) for name, values in state_dict["values"].items()}
        self._n_numbers = Counter(state_dict["n_numbers"])
