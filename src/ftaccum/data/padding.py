"""Collate rows: pad the columns that run along the tokens or the targets, and stack all others."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..objective.item_counts import IGNORE_INDEX, Batch
from ..objective.model_forward import is_label
from ..objective.prefixed import ids_of, mask_of
from .columns import Along, ColumnRules, Columns
from .documents import Documents
from .row import Row
from .short_rows import cut_row
from .values import OddRowError, as_tensor

_NEED_MASK = (("input_ids", -1), ("inputs_embeds", 0))  # models attend to padding in these unless a mask hides it
_NARROW = (torch.int8, torch.int16, torch.int32, torch.uint8)


class PaddingCollator:
    """A collator that pads columns along the tokens to the longest row of the batch, on the tokenizer's side.

    It pads token ids with `pad_token_id`, labels with `ignore_index`, additive masks with the lowest number, and
    everything else with 0. It adds an attention mask if there is none, unless rows are packed: the model then takes
    the documents from `position_ids`. Columns of token ids with a prefix, such as `chosen_input_ids`, get a mask each
    if the model takes it.

    Attributes:
        columns: the columns of a batch; None to derive them from each batch.
        documents: how the model treats packed rows.
        ignore_index: the value to pad labels with.
        left: whether padding comes before the tokens. Packed rows are always padded on the right.
    """

    def __init__(
        self,
        rules: ColumnRules,
        *,
        pad_token_id: int = 0,
        padding_side: str = "right",
        ignore_index: int = IGNORE_INDEX,
        bucketed_up_to: int | None = None,
    ) -> None:
        """Args:
        rules: which columns a batch takes.
        ignore_index: the value to pad labels with.
        bucketed_up_to: the length of the longest row of all. Batches are then padded to one of a few widths, up to this
            one. None to pad to the longest row of the batch.
        """
        self.rules = rules
        self.columns: Columns | None = None
        self.documents = Documents()
        self._pad_token_id, self.ignore_index = pad_token_id, ignore_index
        self.left = padding_side == "left"
        self._bucketed_up_to = bucketed_up_to
        self._dtypes: dict[str, torch.dtype] = {}  # the widest of each column so far

    def cut(self, row: Row, n_tokens: int) -> Row | None:
        """Return a row cut to at most so many tokens; None if it must stay whole."""
        return cut_row(row, self.columns, n_tokens, self.ignore_index)

    def __call__(self, rows: list[Row]) -> Batch:
        """Return the batch of some rows.

        Raises:
            OddRowError: for the first row that does not fit the others.
        """
        if isinstance(rows[0], tuple):
            return _stacked_pairs(rows)
        columns = self.columns or Columns.of(rows, self.rules)
        tensors = columns.tensors(rows)
        packed = self.documents.check(tensors)
        if packed:
            self.documents.ignore_starts(tensors, self.ignore_index)
        elif "attention_mask" not in tensors and columns.token_base in _NEED_MASK:
            name = columns.token_base[0]
            tensors["attention_mask"] = [_ones(t if name == "input_ids" else t[:, 0]) for t in tensors[name]]
        masks = columns.mask_sizes
        for name in [name for name in tensors if ids_of(name) == name]:
            if (mask := mask_of(name)) in masks and mask not in tensors:
                tensors[mask] = [_ones(ids) for ids in tensors[name]]
        left = self.left and not packed  # padding's positions must not continue into a document's
        sizes = masks | columns.sizes
        return {name: self._padded(name, column, sizes[name], left=left) for name, column in tensors.items()}

    def width(self, length: int) -> int:
        """Return the width of a batch whose longest row has this length."""
        length = max(1, length)  # a row may have no tokens, but models need at least one
        return length if self._bucketed_up_to is None else min(_bucket(length), max(length, self._bucketed_up_to))

    def _padded(self, name: str, tensors: Sequence[Tensor], sizes: Sequence[int | Along], *, left: bool) -> Tensor:
        if is_label(name) or name.endswith("_ids"):
            tensors = [t.long() if t.dtype in _NARROW else t for t in tensors]  # as losses and embeddings take them
        # A column with 5 and 3.8 is one of floats, also in a batch with the 5 alone. An empty list has no dtype.
        seen = [self._dtypes[name]] if name in self._dtypes else []
        dtypes = [*seen, *(t.dtype for t in tensors if t.numel())] or [tensors[0].dtype]
        dtype = self._dtypes[name] = functools.reduce(torch.promote_types, dtypes)
        longest = map(max, zip(*(t.shape for t in tensors), strict=True))
        shape = tuple(self.width(n) if isinstance(size, Along) else n for n, size in zip(longest, sizes, strict=True))
        if all(t.shape == shape for t in tensors):
            return torch.stack([t.to(dtype) for t in tensors])
        fill = self._pad_token_id if name.endswith("input_ids") else self.ignore_index if is_label(name) else 0
        padded = torch.full((len(tensors), *shape), fill, dtype=dtype)
        for row, tensor in zip(padded, tensors, strict=True):
            place = tuple(slice(m - n, m) if left else slice(n) for n, m in zip(tensor.shape, shape, strict=True))
            if name == "attention_mask" and tensor.ndim > 1:
                _hide_padding(row, place)
            row[place] = tensor
        return padded


def _ones(ids: Tensor) -> Tensor:
    return torch.ones_like(ids, dtype=torch.long)


def _hide_padding(mask: Tensor, place: tuple[slice, ...]) -> None:
    """Hide padding from all tokens, in a mask with an entry for each pair of tokens. Padding itself attends to all."""
    hidden = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
    mask.fill_(0 if mask.is_floating_point() else 1)
    mask[place[:-1]] = hidden


def _bucket(length: int) -> int:
    """Round a length up to one of at most eight widths per power of two: multiples of 8, as matrix units prefer."""
    step = max(8, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


def _stacked_pairs(rows: Sequence[Row]) -> Batch:
    for place, row in enumerate(rows):
        if not isinstance(row, tuple):
            raise OddRowError(place, f"it is a {type(row).__name__}, but other rows are tuples")
    return _stacked(rows)


def _stacked(values: Sequence[Any]) -> Batch:
    first = values[0]
    if isinstance(first, Mapping):
        for place, value in enumerate(values):
            if odd := value.keys() ^ first.keys():
                raise OddRowError(place, f"its inputs have other names than in other rows: {sorted(odd)}")
        return {key: _stacked([value[key] for value in values]) for key in first}
    if isinstance(first, tuple):
        return tuple(_stacked(part) for part in zip(*values, strict=True))
    return torch.stack([as_tensor(value) for value in values])
