"""Split, trim and compare collated batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..objective.item_counts import TOKEN_COLUMNS, Batch
from ..objective.model_forward import is_label


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


def padded(batch: Batch, width: int, fill: Mapping[str, int]) -> Batch:
    """Return a batch with its token positions padded on the right to a width; unchanged if it has no `input_ids`.

    Args:
        fill: the padding of each column; 0 for a column that it does not name.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim < 2:
        return batch

    def of_tokens(name: str, value: Any) -> bool:
        named = name in TOKEN_COLUMNS or (name == "labels" and not getattr(value, "is_floating_point", bool)())
        return named and isinstance(value, Tensor) and value.shape == ids.shape

    return {
        name: pad(value, (0, width - value.shape[-1]), value=fill.get(name, 0)) if of_tokens(name, value) else value
        for name, value in batch.items()
    }


def join(batches: Sequence[Batch], fill: Mapping[str, int]) -> Batch | None:
    """Return the rows of several batches as one batch, padded on the right to the largest size.

    Args:
        fill: the padding of each column; 0 for a column that it does not name.

    Returns:
        The batch, or None if columns differ, or have other shapes but no known padding.
    """
    first = batches[0]
    if isinstance(first, Mapping):
        if any(not isinstance(batch, Mapping) or batch.keys() != first.keys() for batch in batches):
            return None
        columns = {name: _joined(name, [batch[name] for batch in batches], fill) for name in first}
        return None if any(column is None for column in columns.values()) else columns
    if isinstance(first, list | tuple):
        if any(not isinstance(batch, list | tuple) or len(batch) != len(first) for batch in batches):
            return None
        parts = [_joined("", [batch[n] for batch in batches], fill) for n in range(len(first))]
        return None if any(part is None for part in parts) else type(first)(parts)
    return None


def _joined(name: str, values: Sequence[Any], fill: Mapping[str, int]) -> Any:
    if not all(isinstance(value, Tensor) for value in values):
        return join(values, fill)
    if len({(value.ndim, value.dtype) for value in values}) > 1 or not values[0].ndim:
        return None
    shapes = {value.shape[1:] for value in values}
    if len(shapes) > 1 and not (name in TOKEN_COLUMNS or is_label(name) or name.startswith("decoder_")):
        return None
    size = [max(lengths) for lengths in zip(*shapes, strict=True)]
    return torch.cat([_filled(value, size, fill.get(name, 0)) for value in values])


def _filled(value: Tensor, size: Sequence[int], fill: int) -> Tensor:
    missing = [wanted - length for wanted, length in zip(size, value.shape[1:], strict=True)]
    return pad(value, [n for gap in reversed(missing) for n in (0, gap)], value=fill) if any(missing) else value


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
