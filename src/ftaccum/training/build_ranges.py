"""The ranges of the numbers that a model and its loss can take, as a forward pass shows them."""

import math
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.collator import RowCollator
from ..data.dataset import Rows
from ..data.probe_rows import sample_positions
from ..data.row import length_of
from ..data.value_ranges import ValueRanges
from ..objective.batch_changes import fresh_batch
from ..objective.embedding_limits import find_embedding_limits
from ..objective.forward import Forward, logits_of
from ..objective.index_guard import IndexGuard
from ..objective.item_counts import Batch, targets_of
from ..runtime.state_guards import inspection_mode
from .config import Components

_FEW = 3
_SAME = 1e-3  # two losses, in 16 bits as well
_BINARY_MODULES = (nn.BCELoss, nn.BCEWithLogitsLoss)
_NO_PROBABILITIES = (2.0, -1.0, -100.0)
_BINARY_FUNCTIONS = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)


def find_ranges(
    components: Components,
    forward: Forward,
    rows: Rows,
    row_collator: RowCollator,
    ignore_index: int,
    device: torch.device,
) -> ValueRanges:
    """Return what the numbers in a batch may be. A `loss_fn` that does not say what it ignores may take any label."""
    model, loss_fn = components.model, components.loss_fn
    few = [fresh_batch(row_collator.seeded(rows, [position], 0), device) for position in _short_rows(rows)]
    sizes, lengths = dict(ValueRanges.of_tokens(model).limits), []
    with inspection_mode(model, *forward.modules), IndexGuard():
        for row in few:  # one may be at fault itself, and end the pass before all is seen
            limits = find_embedding_limits(partial(forward, model, row), row)
            sizes |= limits.sizes
            lengths += [] if limits.longest is None else [limits.longest]
        is_binary = _is_binary_module(loss_fn) or (loss_fn is None and _computes_binary(forward, model, few[0]))
        says_what_it_ignores = loss_fn is None or hasattr(loss_fn, "ignore_index")
        n_classes = forward.n_classes(model, few[0]) if says_what_it_ignores else None
    longest = min(lengths, default=None)
    # Asked once, for the first row that is longer: no pass is wider than the data.
    takes_longer = cache(lambda: longest is None or _takes_any(forward, model, few, longest + 1))
    return ValueRanges(sizes, longest, takes_longer, n_classes, ignore_index, is_binary)


def _takes_any(forward: Forward, model: nn.Module, few: Sequence[Batch], length: int) -> bool:
    """Return whether a forward pass of one of these rows succeeds at a length."""
    return any(_takes(forward, model, _stretched(row, length)) for row in few)


def _takes(forward: Forward, model: nn.Module, row: Batch) -> bool:
    """Return whether a forward pass of a row succeeds."""
    try:
        with inspection_mode(model, *forward.modules), IndexGuard():
            forward(model, row)
    except Exception:
        return False
    return True


def _stretched(row: Batch, length: int) -> Batch:
    """Return a row with its tokens again and again, up to a length."""
    width = row["input_ids"].shape[-1]

    def stretch(column: Any) -> Any:
        if not isinstance(column, Tensor) or column.ndim != 2 or column.shape[-1] != width:
            return column
        return column.repeat(1, -(-length // width))[:, :length]

    return {name: stretch(column) for name, column in row.items()}


def _is_binary_module(loss_fn: Any) -> bool:
    """Return whether a loss is one of PyTorch's binary cross entropies."""
    return isinstance(loss_fn, _BINARY_MODULES) or loss_fn in _BINARY_FUNCTIONS


def _computes_binary(forward: Forward, model: nn.Module, row: Batch) -> bool:
    """Return whether the model's own loss is a binary cross entropy of all labels, whatever numbers they are: a loss
    that leaves some of them out is not."""
    labels = targets_of(row)
    if labels is None or not labels.is_floating_point() or not isinstance(row, Mapping):
        return False
    for number in (1.0, *_NO_PROBABILITIES):
        changed = labels.clone()
        changed.view(-1)[0] = number
        try:
            means, outputs = forward(model, {**row, "labels": changed})
            expected = F.binary_cross_entropy_with_logits(logits_of(outputs), changed)
        except Exception:  # logits of another shape, or none
            return False
        if not math.isclose(sum(map(float, means.values())), float(expected), rel_tol=_SAME):
            return False
    return True


def _short_rows(rows: Rows) -> list[int]:
    """Return the positions of a few short rows, of at least two tokens, among those that are looked at."""
    positions = sample_positions(rows)
    lengths = {position: length_of(row) for position, row in zip(positions, rows.fetch(positions), strict=True)}
    return sorted(positions, key=lambda position: (lengths[position] < 2, lengths[position]))[:_FEW]
