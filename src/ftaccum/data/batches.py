"""Split, trim and compare collated batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..objective.item_counts import TOKEN_COLUMNS, Batch


def take(batch: Batch, rows: Sequence[int]) -> Batch:
    """Return some rows of a collated batch, at its width."""
    if isinstance(batch, Mapping):
        return {key: take(value, rows) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(take(value, rows) for value in batch)
    return batch[torch.tensor(rows)]


def trimmed(batch: Batch) -> Batch:
    """Return a batch without the token positions that are padding in every row, if it has an attention mask."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.is_floating_point():
        return batch
    (used,) = mask.any(0).nonzero(as_tuple=True)
    if not len(used):
        return batch
    first, last = int(used[0]), int(used[-1])

    def of_tokens(name: str, value: Any) -> bool:
        named = name in TOKEN_COLUMNS or (
            name == "labels" and isinstance(value, Tensor) and not value.is_floating_point()
        )
        return named and isinstance(value, Tensor) and value.shape == mask.shape

    return {
        name: value[:, first : last + 1].contiguous() if of_tokens(name, value) else value
        for name, value in batch.items()
    }


def can_be_taken_apart(batch: Batch, n_rows: int) -> bool:
    """Return whether every tensor of the batch has the rows along its first dimension."""
    if isinstance(batch, Mapping):
        return all(can_be_taken_apart(value, n_rows) for value in batch.values())
    if isinstance(batch, list | tuple):
        return all(can_be_taken_apart(value, n_rows) for value in batch)
    return isinstance(batch, Tensor) and batch.ndim > 0 and batch.shape[0] == n_rows


def first_dimensions(batch: Batch) -> set[int]:
    """Return the sizes of a batch's tensors along their first dimension."""
    if isinstance(batch, Mapping):
        return first_dimensions(list(batch.values()))
    if isinstance(batch, list | tuple):
        return set().union(*map(first_dimensions, batch))
    return {len(batch)} if isinstance(batch, Tensor) and batch.ndim else set()


def equal_batches(one: Batch, other: Batch) -> bool:
    if isinstance(one, Mapping):
        return all(equal_batches(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return all(map(equal_batches, one, other))
    if not isinstance(one, Tensor):
        return True
    return one.shape == other.shape and bool(((one == other) | (one != one)).all())  # NaN counts as equal to NaN
