"""Rows to a batch: columns that run along the tokens are padded, all others are stacked."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..objective.forward import is_label
from ..objective.item_counts import IGNORE_INDEX, Batch
from .columns import Along, ColumnRules, Columns
from .documents import Documents
from .row import Row
from .values import OddRowError, as_tensor

_NEED_MASK = (("input_ids", -1), ("inputs_embeds", 0))  # tokens that a model attends to unless a mask hides them
_NARROW = (torch.int8, torch.int16, torch.int32, torch.uint8)


class PaddingCollator:
    """Pads columns that run along the tokens to the longest row of the batch, on the tokenizer's side.

    Token ids are padded with `pad_token_id`, labels with `ignore_index`, additive masks with the lowest number, and
    everything else with 0. An attention mask is made where there is none, unless rows are packed: there the model takes
    the documents from `position_ids`.

    Attributes:
        columns: those of a batch; None where each batch tells its own.
        documents: what to do with packed rows.
        ignore_index: what labels are padded with.
        left: whether padding comes before the tokens. Packed rows are padded on the right in any case.
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
        ignore_index: what labels are padded with.
        bucketed_up_to: the length of the longest row, to pad on to one of a few widths, of which this is the largest;
            None to pad to the longest row of the batch.
        """
        self.rules = rules
        self.columns: Columns | None = None
        self.documents = Documents()
        self._pad_token_id, self.ignore_index = pad_token_id, ignore_index
        self.left = padding_side == "left"
        self._bucketed_up_to = bucketed_up_to
        self._dtypes: dict[str, torch.dtype] = {}  # of each column, the widest met so far

    def __call__(self, rows: list[Row]) -> Batch:
        """Return the batch of some rows.

        Raises:
            OddRowError: naming the first row that does not go with the others.
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
        left = self.left and not packed  # positions of padding must not lead on to those of a document
        sizes = {"attention_mask": columns.mask_sizes} | columns.sizes
        return {name: self._padded(name, column, sizes[name], left=left) for name, column in tensors.items()}

    def width(self, length: int) -> int:
        """Return what rows of tokens are padded to, where the longest of them has this length."""
        length = max(1, length)  # models cannot do with no token at all, which a row may have
        return length if self._bucketed_up_to is None else min(_bucket(length), max(length, self._bucketed_up_to))

    def _padded(self, name: str, tensors: Sequence[Tensor], sizes: Sequence[int | Along], *, left: bool) -> Tensor:
        if is_label(name) or name.endswith("_ids"):
            tensors = [t.long() if t.dtype in _NARROW else t for t in tensors]  # as losses and embeddings take them
        # 5 and 3.8 make a column of floats, also in a batch that has the 5 alone; an empty list has no type of its own.
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
    """Let no token attend to padding, in a mask with a place for each pair of tokens. Padding attends to all."""
    hidden = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
    mask.fill_(0 if mask.is_floating_point() else 1)
    mask[place[:-1]] = hidden


def _bucket(length: int) -> int:
    """Return the next of eight widths an octave (at most an eighth more), a multiple of 8, as matrix units like it."""
    step = max(8, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


def _stacked_pairs(rows: Sequence[Row]) -> Batch:
    for place, row in enumerate(rows):
        if not isinstance(row, tuple):
            raise OddRowError(place, f"it is a {type(row).__name__}, and other rows are tuples")
    return _stacked(rows)


def _stacked(values: Sequence[Any]) -> Batch:
    first = values[0]
    if isinstance(first, Mapping):
        for place, value in enumerate(values):
            if odd := value.keys() ^ first.keys():
                raise OddRowError(place, f"its inputs have other names than those of other rows: {sorted(odd)}")
        return {key: _stacked([value[key] for value in values]) for key in first}
    if isinstance(first, tuple):
        return tuple(_stacked(part) for part in zip(*values, strict=True))
    return torch.stack([as_tensor(value) for value in values])
