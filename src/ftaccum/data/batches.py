"""Split, trim, join, pad and compare collated batches."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError
from ..objective.item_counts import TOKEN_COLUMNS, Batch
from ..objective.model_forward import is_label
from ..objective.prefixed import length_columns
from .column_fills import OF_DECODER, ColumnFills, is_along, values_at_padding


def take(batch: Batch, rows: Sequence[int]) -> Batch:
    """Return some rows of a collated batch, at its width."""
    if isinstance(batch, Mapping):
        return {key: take(value, rows) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(take(value, rows) for value in batch)
    return batch[torch.tensor(rows)]


def as_mapping(batch: Batch) -> Batch:
    """Return a pair (inputs, targets) whose inputs are token ids, or a mapping, as a mapping; else the batch itself."""
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        return batch
    inputs, targets = batch
    if isinstance(inputs, Mapping):
        return batch if "labels" in inputs else {**inputs, "labels": targets}
    are_ids = isinstance(inputs, Tensor) and inputs.ndim == 2 and not inputs.is_floating_point()
    return {"input_ids": inputs, "labels": targets} if are_ids else batch


def in_form_of(batch: Batch, columns: Batch) -> Batch:
    """Return columns that `as_mapping` may have made in the form of a batch."""
    if not isinstance(columns, Mapping) or isinstance(batch, Mapping):
        return columns
    inputs = {name: value for name, value in columns.items() if name != "labels"}
    parts = (inputs if isinstance(batch[0], Mapping) else columns["input_ids"], columns["labels"])
    return type(batch)(parts)


def trimmed(batch: Batch, along: Collection[str] = ()) -> Batch:
    """Return a batch without the token positions that are padding in every row, if it has an attention mask.

    Trim columns of the mask's shape, with or without a further dimension: token ids and their masks, integer labels,
    and other columns that have a single value wherever the mask is 0. Others may have this width by chance.

    Args:
        along: the names of other columns that are known to be along the tokens.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.is_floating_point():
        return batch
    (used,) = mask.any(0).nonzero(as_tuple=True)
    if not len(used) or len(used) == mask.shape[1]:
        return batch
    first, last = int(used[0]), int(used[-1])
    seen = values_at_padding([batch])

    def of_tokens(name: str, value: Any) -> bool:
        if not is_along(value, mask):
            return False
        if value.ndim == 2 and (name in TOKEN_COLUMNS or (name == "labels" and not value.is_floating_point())):
            return True
        return name in along or len(seen.get(name, ())) == 1

    return {
        name: value[:, first : last + 1].contiguous() if of_tokens(name, value) else value
        for name, value in batch.items()
    }


def join(batches: Sequence[Batch], fill: Mapping[str, int]) -> Batch | None:
    """Return one batch of the rows of several collated batches; None if they cannot be one batch.

    Columns along the tokens are padded on the right to the largest width, so that tokens keep their positions. These
    are token ids and their masks, integer labels, and other columns that are as wide as `input_ids` in every batch.
    All other columns must have the same shape in every batch, apart from the number of rows. A column whose padding is
    unknown is not padded.

    Args:
        batches: mappings of tensors, or tuples (inputs, targets). Targets are padded as labels are.
        fill: the padding of `input_ids` and `labels`, unless the batches show another one. That of `input_ids` is also
            for a decoder's token ids and others with a name that ends like this.
    """
    if not all(map(has_rows, batches)):
        return None
    try:
        fills = ColumnFills(fill, values_at_padding(batches))
        return _joined("", batches, [_width(batch) for batch in batches], fills)
    except _UnequalBatchesError:
        return None


def padded(batch: Batch, width: int, fills: ColumnFills) -> Batch:
    """Return a batch with its columns along the tokens padded on the right to a width.

    These are `input_ids` and the columns of the same shape, such as its masks and integer labels, also if they have a
    further dimension. The columns of a decoder, and its labels, stay as they are. Return the batch itself if it has no
    `input_ids`, or if they are as wide already.

    Raises:
        DataError: if the padding of a column is unknown.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim < 2 or ids.shape[-1] >= width:
        return batch
    has_decoder = any(name.startswith(OF_DECODER) for name in batch)

    def of_tokens(name: str, value: Any) -> bool:
        if not isinstance(value, Tensor) or name.startswith(OF_DECODER):
            return False
        if is_label(name):
            return value.shape == ids.shape and not value.is_floating_point() and not has_decoder
        return value.shape[: ids.ndim] == ids.shape and value.ndim <= ids.ndim + 1

    def wide(name: str, value: Tensor) -> Tensor:
        if (fill := fills.of(name, [value])) is None:
            raise DataError(
                f"Padding changes the loss, so all rows of a window must have one length, but it is unknown what pads "
                f"the column {name!r}. Pad all batches to one length in the collator, or give an `attention_mask` that "
                "is 0 where this column is padded."
            )
        return _pad(value, ids.ndim - 1, width, fill)

    return {name: wide(name, value) if of_tokens(name, value) else value for name, value in batch.items()}


def token_counts(batch: Batch) -> tuple[int, int]:
    """Return the number of token positions without and with padding, over all texts of a row; 0 without token ids."""
    tokens = 0
    for ids, mask in _texts_of(batch):
        has_mask = isinstance(mask, Tensor) and mask.shape == ids.shape
        tokens += int(mask.sum()) if has_mask else ids.numel()
    return tokens, token_positions(batch)


def token_positions(batch: Batch) -> int:
    """Return the number of token positions, padding included, over all texts of a row; 0 without token ids."""
    return sum(ids.numel() for ids, _ in _texts_of(batch))


def _texts_of(batch: Batch) -> list[tuple[Tensor, Any]]:
    """Return the token ids of each text of a row, with the attention mask that has the same prefix."""
    columns = {str(name): value for name, value in batch.items()} if isinstance(batch, Mapping) else {}
    return [
        (columns[name], columns.get(name.removesuffix("input_ids") + "attention_mask"))
        for name in length_columns(columns)
        if isinstance(columns[name], Tensor)
    ]


def hides_padding(batches: Sequence[Batch]) -> bool:
    """Return whether attention masks hide all padding that `join` adds to token ids. A decoder needs no mask."""
    inputs = [batch if isinstance(batch, Mapping) else batch[0] for batch in batches]
    for name in map(str, inputs[0] if isinstance(inputs[0], Mapping) else ()):
        if not name.endswith("input_ids") or name.startswith(OF_DECODER):
            continue
        mask = name.removesuffix("input_ids") + "attention_mask"
        has_masks = all(mask in batch and batch[mask].shape == batch[name].shape for batch in inputs)
        if not has_masks and len({batch[name].shape[-1] for batch in inputs}) > 1:
            return False
    return True


def has_rows(batch: Batch) -> bool:
    """Return whether a batch consists of tensors that all have the same number of rows along their first dimension."""
    sizes = first_dimensions(batch)
    return len(sizes) == 1 and can_be_taken_apart(batch, *sizes)


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


class _UnequalBatchesError(Exception):
    """A difference between batches that padding does not remove."""


def _joined(name: str, parts: Sequence[Any], widths: Sequence[int | None], fills: ColumnFills) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return _concatenated(name, parts, widths, fills)
    if any(type(part) is not type(first) or len(part) != len(first) for part in parts):
        raise _UnequalBatchesError
    if isinstance(first, Mapping):
        if any(part.keys() != first.keys() for part in parts):
            raise _UnequalBatchesError
        return {key: _joined(str(key), [part[key] for part in parts], widths, fills) for key in first}
    is_pair = not name and len(first) == 2
    names = ("inputs", "labels") if is_pair else [f"{name}[{n}]" for n in range(len(first))]
    columns = zip(names, zip(*parts, strict=True), strict=True)
    return type(first)(_joined(key, column, widths, fills) for key, column in columns)


def _concatenated(name: str, tensors: Sequence[Any], widths: Sequence[int | None], fills: ColumnFills) -> Tensor:
    if len({tensor.ndim for tensor in tensors}) > 1 or len({tensor.dtype for tensor in tensors}) > 1:
        raise _UnequalBatchesError
    sizes = [{tensor.shape[dim] for tensor in tensors} for dim in range(tensors[0].ndim)]
    unequal = [dim for dim, found in enumerate(sizes) if dim and len(found) > 1]
    for dim in unequal:
        if len(unequal) > 1 or not _is_along_tokens(name, tensors, dim, widths):
            raise _UnequalBatchesError
        if (fill := fills.of(name, tensors)) is None:
            raise _UnequalBatchesError
        tensors = [_pad(tensor, dim, max(sizes[dim]), fill) for tensor in tensors]
    return torch.cat(list(tensors))


def _is_along_tokens(name: str, tensors: Sequence[Tensor], dim: int, widths: Sequence[int | None]) -> bool:
    if is_label(name):
        return dim == 1 and not tensors[0].is_floating_point() and tensors[0].dtype != torch.bool
    if name.startswith(OF_DECODER) and name.endswith("embeds"):
        return dim == 1
    if any(name == column or name.endswith(f"_{column}") for column in TOKEN_COLUMNS):
        return dim == tensors[0].ndim - 1
    return [tensor.shape[dim] for tensor in tensors] == list(widths)


def _width(batch: Batch) -> int | None:
    """Return the number of tokens per row, padding included; None if there are no tokens."""
    inputs = batch if isinstance(batch, Mapping) else batch[0]
    columns = [inputs.get(name) for name in ("input_ids", "attention_mask")] if isinstance(inputs, Mapping) else []
    return next((t.shape[-1] for t in columns if isinstance(t, Tensor) and t.ndim > 1), None)


def _pad(tensor: Tensor, dim: int, width: int, fill: float) -> Tensor:
    """Pad one dimension of a column on the right."""
    after = (0, 0) * (tensor.ndim - 1 - dim)
    return F.pad(tensor, (*after, 0, width - tensor.shape[dim]), value=fill)
