"""The numbers that a model accepts, to name a row that is out of range before the model gets it."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ..errors import DataError
from ..objective.embedding_limits import Place, columns_of
from ..objective.item_counts import Batch, targets_of
from .dataset import Rows
from .labels import LABELS

_ROUNDING = 1e-3  # tolerance for labels that were computed
_AT_ONCE = 1024  # rows to check together
_IsOutside = Callable[[Any], Any]  # takes an array or a tensor, returns where its numbers are out of range


@dataclass(frozen=True)
class ValueRanges:
    """The numbers that the model accepts.

    Attributes:
        limits: for each column, or each place in a column, the number that its numbers must be below.
        longest: the number of the model's position embeddings; None if it has none.
        takes_longer: returns whether the model accepts longer rows, because it truncates rows or clamps positions.
        n_classes: the number that labels must be below, unless they are ignored; None if labels are not class numbers.
        ignore_index: the label that the loss ignores.
        probabilities: whether labels are probabilities, as in binary cross entropy.
    """

    limits: Mapping[Place, int] = field(default_factory=dict)
    longest: int | None = None
    takes_longer: Callable[[], bool] = lambda: False
    n_classes: int | None = None
    ignore_index: int = -100
    probabilities: bool = False

    @classmethod
    def of_tokens(cls, model: Any) -> "ValueRanges":
        """Return the range of token ids, and of nothing else, from the model's input embeddings."""
        try:
            embeddings = model.get_input_embeddings()
        except (AttributeError, NotImplementedError):  # a plain module; a model of images
            embeddings = None
        size = getattr(embeddings, "num_embeddings", None)
        return cls() if size is None else cls({("input_ids", None): size})

    def check(self, batch: Batch, rows: Rows, positions: Sequence[int]) -> None:
        """Raise DataError if a number is out of range, naming the first such row. On a GPU, the model's own error names
        no row, and leaves the device unusable."""
        columns = columns_of(batch)
        for (name, place), size in self.limits.items():
            if (numbers := columns.get(name)) is not None and not numbers.is_floating_point():
                of_place = numbers if place is None else numbers[:, place]
                self._check_batch(_outside(size), of_place, batch, rows, positions, _of_column(name, place, size))
        labels = targets_of(batch)
        if labels is not None and (is_outside := self._outside_labels(labels.is_floating_point())):
            self._check_batch(is_outside, labels, batch, rows, positions, self._of_labels())
        ids = columns.get("input_ids")
        if self.longest is not None and ids is not None and ids.ndim == 2 and len(ids) == len(positions):
            mask = columns.get("attention_mask")
            lengths = mask.sum(1) if mask is not None and mask.shape == ids.shape else [ids.shape[1]] * len(ids)
            self._check_lengths(list(map(int, lengths)), rows, positions)

    def check_all(self, rows: Rows) -> None:
        """Raise DataError if a number is out of range, naming the first such row. This checks rows that need not be
        computed; others are checked when they are loaded."""
        for (name, place), size in self.limits.items():
            self._check_column(rows, name, place, _outside(size), _of_column(name, place, size))
        for name in (*LABELS, "targets"):
            for is_float in (False, True):
                if is_outside := self._outside_labels(is_float):
                    self._check_column(rows, name, None, is_outside, self._of_labels(), is_float=is_float)
        lengths = rows.lengths() if rows.have_tokens else None
        if lengths is not None:
            self._check_lengths(lengths, rows, range(len(rows)))

    def _outside_labels(self, is_float: bool) -> _IsOutside | None:
        """Return a function that finds labels out of range; None if any number is allowed."""
        if is_float:
            return (lambda labels: (labels < -_ROUNDING) | (labels > 1 + _ROUNDING)) if self.probabilities else None
        if self.n_classes is None:
            return None
        outside = _outside(self.n_classes)
        return lambda labels: outside(labels) & (labels != self.ignore_index)

    def _of_labels(self) -> str:
        if self.probabilities:
            return (
                "label {}, but the loss is a binary cross entropy, whose labels are probabilities from 0 to 1. "
                "Fix the label, or give a `loss_fn` for other numbers."
            )
        return (
            f"label {{}}, but the model has {self.n_classes} classes, 0 to {(self.n_classes or 0) - 1}. "
            f"Load the model with a `num_labels` that fits, or fix the label ({self.ignore_index} is ignored)."
        )

    def _check_lengths(self, lengths: Sequence[int], rows: Rows, positions: Sequence[int]) -> None:
        if self.longest is None:
            return
        for position, length in zip(positions, lengths, strict=True):
            if length > self.longest and not self.takes_longer():
                raise DataError(
                    f"In `{rows.argument}`, {rows.name_of(position)} has {length} tokens, but the model has positions "
                    f"for {self.longest}. Truncate the row, or load a model with a larger `max_position_embeddings`."
                )

    @staticmethod
    def _check_column(
        rows: Rows, name: str, place: int | None, is_outside: _IsOutside, message: str, *, is_float: bool = False
    ) -> None:
        values = rows.column(name)
        if values is None:
            return
        found = _first_outside(values, place, is_outside, "f" if is_float else "iu")
        if found is not None:
            raise DataError(f"In `{rows.argument}`, {rows.name_of(found[0])} has the {message.format(found[1])}")

    @staticmethod
    def _check_batch(
        is_outside: _IsOutside, values: Tensor, batch: Batch, rows: Rows, positions: Sequence[int], message: str
    ) -> None:
        outside = is_outside(values)
        if outside.any():
            first = outside.nonzero()[0]
            row, value = int(first[0]), values[tuple(first)].item()
            if len(outside) == 1 < len(positions) and isinstance(batch, Mapping) and "position_ids" in batch:
                # The rows are concatenated, and each begins with position 0.
                row = int((batch["position_ids"][0, : first[1] + 1] == 0).sum()) - 1
            name = rows.name_of(positions[row]) if row < len(positions) else f"one of {rows.names_of(positions)}"
            raise DataError(f"In `{rows.argument}`, {name} has the {message.format(value)}")


def _outside(size: int) -> _IsOutside:
    return lambda numbers: (numbers < 0) | (numbers >= size)


def _of_column(name: str, place: int | None, size: int) -> str:
    if name == "input_ids":
        return (
            f"token id {{}}, but the model's vocabulary is 0 to {size - 1}. "
            "Tokenize with the model's own tokenizer, or resize its embeddings."
        )
    where = f"`{name}`" if place is None else f"element {place} of `{name}`"
    return (
        f"number {{}} in {where}, but the model has {size} embeddings for it, 0 to {size - 1}. Fix the row, or load a "
        "model with more embeddings."
    )


def _first_outside(
    values: "pa.ChunkedArray | Iterable[Any]", place: int | None, is_outside: _IsOutside, kinds: str
) -> tuple[int, Any] | None:
    """Return the first row with a number out of range, and that number; None if there is none.

    Args:
        values: the values of a column, row by row.
        place: the element of each row to check; None for all.
        kinds: the kinds of numbers to check, as in NumPy's `dtype.kind`; others are skipped.
    """
    if isinstance(values, pa.ChunkedArray):
        if place is None and not _any_outside(_flattened(values), is_outside, kinds):
            return None
        values = values.to_pylist()
    values = list(values)
    for start in range(0, len(values), _AT_ONCE):
        chunk = values[start : start + _AT_ONCE]
        together = _together(chunk) if place is None else None
        if together is not None and not _any_outside(together, is_outside, kinds):
            continue
        for row, value in enumerate(chunk, start):
            numbers = _array(value)
            numbers = numbers if place is None or numbers.ndim == 0 else numbers[place : place + 1]
            if _any_outside(numbers, is_outside, kinds):
                return row, numbers[is_outside(numbers)].flat[0].item()
    return None


def _together(values: Sequence[Any]) -> np.ndarray | None:
    """Return the numbers of many rows in one array, which is much faster than an array for each row; None if the rows
    are of several types, or do not fit into one array."""
    try:
        if all(type(value) is list for value in values):
            return np.asarray(list(itertools.chain.from_iterable(values)))
        if all(isinstance(value, Tensor) and value.device.type == "cpu" for value in values):
            return torch.cat([value.reshape(-1) for value in values]).numpy()
        if all(isinstance(value, np.ndarray) for value in values):
            return np.concatenate([value.reshape(-1) for value in values])
        return np.asarray(values)
    except (ValueError, TypeError, RuntimeError):  # ragged lists, or rows of several types
        return None


def _any_outside(numbers: np.ndarray, is_outside: _IsOutside, kinds: str) -> bool:
    return numbers.dtype.kind in kinds and bool(is_outside(numbers).any())


def _flattened(column: pa.ChunkedArray) -> np.ndarray:
    """Return all numbers of a column of numbers or of lists of numbers."""
    array = column.combine_chunks()
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    return array.drop_null().to_numpy(zero_copy_only=False)


def _array(value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError):  # lists of unequal lengths; a tensor on a device
        return np.empty(0)
