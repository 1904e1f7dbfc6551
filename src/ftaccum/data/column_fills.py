"""The value that pads each column of collated batches, as far as the batches show it."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..objective.item_counts import IGNORE_INDEX, TOKEN_COLUMNS, Batch
from ..objective.model_forward import is_label

OF_DECODER = "decoder_"  # the prefix of columns that are as wide as the labels, not as `input_ids`

Seen = Mapping[str, Collection[float]]


class ColumnFills:
    """The value that pads each column: the one that the collator uses, if batches show it."""

    def __init__(self, known: Mapping[str, int], seen: Seen) -> None:
        """Args:
        known: the padding of `input_ids` and `labels`, and that of any column for which nothing else is known.
        seen: the values of columns at positions that are padding, as `values_at_padding` returns them.
        """
        self._known, self._seen = known, seen

    def of(self, name: str, tensors: Sequence[Tensor]) -> float | None:
        """Return the padding of a column; None if it is unknown.

        Args:
            tensors: the column in the batches at hand.
        """
        seen, ignored = list(self._seen.get(name, ())), self._known.get("labels", IGNORE_INDEX)
        if is_label(name):  # targets may be as wide as the inputs by chance, so the ignored label is more certain
            return seen[0] if len(seen) == 1 and not _contain(ignored, tensors) else ignored
        if len(seen) == 1:
            return seen[0]
        if name.endswith("input_ids"):
            return self._known.get("input_ids", 0)
        if not tensors[0].is_floating_point() and _contain(IGNORE_INDEX, tensors):
            return IGNORE_INDEX
        is_usual = name.endswith("mask") or (name.startswith(OF_DECODER) and name.endswith("embeds"))
        if is_usual or any(name == column or name.endswith(f"_{column}") for column in TOKEN_COLUMNS):
            return 0
        return self._known.get(name)


def values_at_padding(batches: Sequence[Batch]) -> dict[str, set[float]]:
    """Return the values of each column at the positions before and after the tokens of each row, at most two values.

    Only columns of the shape of `attention_mask` are looked at, with or without a further dimension.
    """
    seen: dict[str, set[float]] = {}
    odd: set[str] = set()
    for columns in map(columns_of, batches):
        mask = columns.get("attention_mask")
        if mask is None or mask.ndim < 2 or mask.is_floating_point():
            continue
        at_padding = _outside(mask)
        for name, tensor in columns.items():
            if name.startswith(OF_DECODER):
                continue
            if not is_along(tensor, mask):
                odd.add(name)
            elif len(found := seen.setdefault(name, set())) < 2:
                found.update(tensor[at_padding].unique()[:2].tolist())
    return {name: set(sorted(found)[:2]) for name, found in seen.items() if name not in odd}


def columns_of(batch: Batch) -> dict[str, Tensor]:
    """Return the columns of a mapping, or of a pair (inputs, targets), whose targets are `labels`."""
    if isinstance(batch, Mapping):
        return {str(name): value for name, value in batch.items() if isinstance(value, Tensor)}
    if isinstance(batch, list | tuple) and len(batch) == 2:
        inputs, targets = batch
        labels = {"labels": targets} if isinstance(targets, Tensor) else {}
        return (columns_of(inputs) if isinstance(inputs, Mapping) else {}) | labels
    return {}


def is_along(value: Any, tokens: Tensor) -> bool:
    """Return whether a column has the shape of `tokens`, with or without a further dimension."""
    if not isinstance(value, Tensor) or value.shape[: tokens.ndim] != tokens.shape:
        return False
    # A mask over pairs of tokens is along them twice.
    return value.ndim == tokens.ndim or (value.ndim == tokens.ndim + 1 and value.shape[-1] != tokens.shape[-1])


def _outside(mask: Tensor) -> Tensor:
    """Return which positions lie before the first or after the last token of their row."""
    used = mask != 0
    return (used.cumsum(-1) == 0) | (used.flip(-1).cumsum(-1).flip(-1) == 0)


def _contain(value: int, tensors: Sequence[Tensor]) -> bool:
    return any(bool(torch.any(tensor == value)) for tensor in tensors)
