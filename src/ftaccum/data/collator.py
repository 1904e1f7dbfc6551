"""Rows to batches, and batches cut into smaller ones."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..objective.forward import is_label
from ..objective.item_counts import IGNORE_INDEX, TOKEN_COLUMNS, Batch
from ..runtime.state_guards import Generators, preserve_rng, seed_all
from .batches import equal_batches, first_dimensions
from .dataset import Rows
from .row import Row

_FEW = 4

Collator = Callable[[list[Row]], Batch]


class PaddingCollator:
    """Pads every column to its longest row in the batch, in as many dimensions as it has.

    Token ids are padded with `pad_token_id`, labels with `ignore_index`, all else with 0, on the tokenizer's side.
    Where ids came without an attention mask, one is made.
    """

    def __init__(
        self,
        accepted: set[str] | None,
        *,
        pad_token_id: int = 0,
        padding_side: str = "right",
        ignore_index: int = IGNORE_INDEX,
        keep_all: bool = False,
        bucketed_up_to: int | None = None,
    ) -> None:
        """Args:
        accepted: the columns that the model takes; None where it takes any.
        ignore_index: what labels are padded with.
        keep_all: whether to keep other columns of numbers, for a `loss_fn` to find.
        bucketed_up_to: where given, the length of the longest row: token columns are padded on to one of a few
            widths, of which this is the largest.
        """
        self._bucketed_up_to = bucketed_up_to
        self._needed = {*(accepted or ()), "input_ids", "labels"}  # a plain module may name its ids as it likes
        self._keep_all = keep_all or accepted is None
        self._pad_token_id, self._ignore_index = pad_token_id, ignore_index
        self._left = padding_side == "left"
        self._dtypes: dict[str, torch.dtype] = {}  # of each column, the widest met so far

    def __call__(self, rows: list[Row]) -> Batch:
        if isinstance(rows[0], tuple):
            return tuple(_stacked(column) for column in zip(*rows, strict=True))
        keys = {column_name(key): key for key in rows[0]} | {key: key for key in rows[0]}  # the exact name wins
        keys = {n: k for n, k in keys.items() if n in self._needed or (self._keep_all and _is_numeric(rows[0][k]))}
        batch = {name: self._padded(name, [_numbers(row, key) for row in rows]) for name, key in keys.items()}
        if "input_ids" in batch and "attention_mask" not in batch:
            ones = [torch.ones_like(_tensor(row[keys["input_ids"]]), dtype=torch.long) for row in rows]
            batch["attention_mask"] = self._padded("attention_mask", ones)
        return batch

    def width(self, length: int) -> int:
        """What rows of tokens, of which the longest has this length, are padded to."""
        length = max(1, length)  # models cannot do with no token at all, which a row may have
        return length if self._bucketed_up_to is None else min(_bucket(length), max(length, self._bucketed_up_to))

    def _padded(self, name: str, values: Sequence[Any]) -> Tensor:
        tensors = [_tensor(value) for value in values]
        if is_label(name) or name.endswith("_ids"):
            tensors = [_widened(t) for t in tensors]
        # 5 and 3.8 make a column of floats, also in a batch that has the 5 alone; an empty list has no type of its own.
        seen = [self._dtypes[name]] if name in self._dtypes else []
        dtypes = [*seen, *(t.dtype for t in tensors if t.numel())] or [tensors[0].dtype]
        dtype = self._dtypes[name] = functools.reduce(torch.promote_types, dtypes)
        tensors = [t.to(dtype) for t in tensors]
        shapes = {t.shape for t in tensors}
        if len({len(shape) for shape in shapes}) > 1:
            raise ValueError(f"column {name!r} has rows of {sorted({len(s) for s in shapes})} dimensions")
        size = tuple(map(max, zip(*shapes, strict=True)))
        if len(size) == 1 and (name in TOKEN_COLUMNS or (name == "labels" and not dtype.is_floating_point)):
            size = (self.width(size[0]),)
        if shapes == {size}:
            return torch.stack(tensors)
        fill = self._pad_token_id if name == "input_ids" else self._ignore_index if is_label(name) else 0
        padded = torch.full((len(tensors), *size), fill, dtype=dtype)
        for row, tensor in zip(padded, tensors, strict=True):
            row[tuple(slice(m - n, m) if self._left else slice(n) for n, m in zip(tensor.shape, size, strict=True))] = (
                tensor
            )
        return padded


class RowCollator:
    """The one way from rows to a batch: the user's collator or the padding one, with the faulty row named.

    Attributes:
        draws: whether the collator draws at random (masked LM), so that rows must be collated a window at a time
            for the draws not to depend on how the window is cut.
        repeats: whether rows and collator give the same batch again from the same seed: those with a generator of their
            own do not.
        width: of a batch, from the length of its longest row.
    """

    def __init__(self, collator: Collator, accepted: set[str] | None = None) -> None:
        """Args:
        collator: the user's, or the padding one.
        accepted: the columns that the model takes. Beside any of them, others that are no numbers are left out:
            no tensor can be made of them.
        """
        self._collator = collator
        self._accepted = accepted or set()
        self.draws, self.repeats = False, True
        self._sound: list[Row] = []  # a row that others were collated with, if one is known
        self._has_a_row_each = False
        self.width: Callable[[int], int] = getattr(collator, "width", lambda length: length)

    def __call__(self, rows: Rows, positions: Sequence[int], seed: Sequence[int] = ()) -> Batch:
        """Collates the rows at these positions.

        Args:
            seed: of what rows draw, where they do.

        Raises:
            DataError: naming the first row that cannot be collated with the others.
        """
        fetched = self._fetched(rows, positions, seed)
        try:
            batch = self._collator(fetched)
        except Exception as error:
            raise DataError(self._explained(rows, positions, fetched, error)) from error
        if self._has_a_row_each and len(fetched) not in (sizes := first_dimensions(batch)):
            raise DataError(
                f"`data_collator` was given {len(fetched)} rows and made a batch of {max(sizes, default=0)} of them, "
                f"while others had all of theirs: it was given {rows.names_of(positions)} of `{rows.argument}`. Have "
                "it keep every row, and drop those that are not to be trained on beforehand."
            )
        return batch

    def seeded(self, rows: Rows, positions: Sequence[int], *seed: int, rows_seed: Sequence[int] | None = None) -> Batch:
        """The same, with every draw settled by the seed, and no generator moved.

        Args:
            rows_seed: of what rows draw, where that is to be another one.
        """
        with preserve_rng():
            seed_all(*seed)
            return self(rows, positions, seed if rows_seed is None else rows_seed)

    def find_draws(self, rows: Rows) -> None:
        """Sees whether rows draw, whether the collator does, of a few of them, and whether these make the same batch
        again from one seed."""
        rows.find_draws()
        positions = range(min(_FEW, len(rows)))
        one, again, other = (self.seeded(rows, positions, seed, rows_seed=(0,)) for seed in (1, 1, 2))
        self.repeats = equal_batches(one, again)
        if len(positions) > 1:
            self._sound = self._fetched(rows, positions[:1], (0,))
            self._has_a_row_each = len(positions) in first_dimensions(one)
        # What it draws may come to nothing in most batches.
        self.draws = self._moves_generators(rows, positions) or not equal_batches(one, other)

    def _moves_generators(self, rows: Rows, positions: Sequence[int]) -> bool:
        with preserve_rng():
            before = Generators.now()
            self(rows, positions, (0,))  # rows leave them as they were
            return not before.unchanged()

    def _fetched(self, rows: Rows, positions: Sequence[int], seed: Sequence[int]) -> list[Row]:
        return [self._without_texts(row) for row in rows.fetch(positions, seed)]

    def _without_texts(self, row: Row) -> Row:
        if not isinstance(row, Mapping) or not self._accepted & row.keys():
            return row
        return {key: value for key, value in row.items() if key in self._accepted or _is_numeric(value)}

    def _explained(self, rows: Rows, positions: Sequence[int], fetched: list[Row], error: Exception) -> str:
        # Any of them may be the odd one: fewest are at odds with a sound one.
        if found := [misfits for row in [*self._sound, *fetched[:_FEW]] if (misfits := self._misfits(row, fetched))]:
            misfits = min(found, key=len)
            first = min(misfits)
            return (
                f"Of `{rows.argument}`, {rows.name_of(positions[first])} cannot be made part of a batch: "
                f"{misfits[first]}. Columns must be numbers or lists of them, shaped as in other rows but for their "
                "lengths. Mend or drop the row, or give a `data_collator`."
            )
        return (
            f"The {rows.names_of(positions)} of `{rows.argument}` cannot be collated together: {error}. "
            "Give a `data_collator` that can."
        )

    def _misfits(self, sound: Row, fetched: Sequence[Row]) -> dict[int, Exception]:
        """Which of the rows, by place, cannot be collated alone or with a sound one, and why."""
        found: dict[int, Exception] = {}
        for n, row in enumerate(fetched):
            try:
                self._collator([row])
                self._collator([sound, row])
            except Exception as error:
                found[n] = error
        return found


def _bucket(length: int) -> int:
    """The next of eight widths an octave (at most an eighth more), and a multiple of 8, as matrix units like it."""
    step = max(8, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


def column_name(key: str) -> str:
    """What Transformers' models call a column."""
    return {"label": "labels", "label_ids": "labels"}.get(key, key)


def _is_numeric(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, Tensor | np.ndarray | np.generic | int | float) or value == []


def _numbers(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        raise ValueError(f"it has no column {key!r}")
    if not _is_numeric(row[key]):
        raise ValueError(f"its column {key!r} holds {row[key]!r}")
    return row[key]


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple) and not value:
        return torch.empty(0, dtype=torch.long)
    if isinstance(value, float | list | tuple):
        return torch.tensor(value)  # Python's floats take torch's default dtype
    return torch.as_tensor(value)


def _widened(tensor: Tensor) -> Tensor:
    """Class numbers and token ids as the losses and embeddings of PyTorch take them."""
    narrow = (torch.int8, torch.int16, torch.int32, torch.uint8)
    return tensor.long() if tensor.dtype in narrow else tensor


def _stacked(column: Sequence[Any]) -> Any:
    if isinstance(column[0], Mapping):
        return {key: _stacked([item[key] for item in column]) for key in column[0]}
    if isinstance(column[0], tuple):
        return tuple(_stacked(part) for part in zip(*column, strict=True))
    return torch.stack([_tensor(item) for item in column])
