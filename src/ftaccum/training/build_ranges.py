"""The ranges of the numbers that a model and its loss can take, as a forward pass shows them."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import nn

from ..data.collator import RowCollator
from ..data.dataset import Rows
from ..data.probe_rows import sample_positions
from ..data.row import length_of
from ..data.value_ranges import ValueRanges
from ..objective.embedding_limits import find_embedding_limits
from ..objective.forward import Forward
from ..runtime.state_guards import inspection_mode
from .config import Components

_FEW = 3
_BINARY_MODULES = (nn.BCELoss, nn.BCEWithLogitsLoss)
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
    few = [send_to_device(row_collator.seeded(rows, [position], 0), device) for position in _short_rows(rows)]
    sizes, longest = dict(ValueRanges.of_tokens(model).limits), []
    with inspection_mode(model):
        for row in few:  # one may be at fault itself, and end the pass before all is seen
            limits = find_embedding_limits(partial(forward, model, row), row)
            sizes |= limits.sizes
            longest += [] if limits.longest is None else [limits.longest]
        is_binary = _is_binary(model, loss_fn)  # after the pass in which a head of Transformers settles its problem
        says_what_it_ignores = loss_fn is None or hasattr(loss_fn, "ignore_index")
        n_classes = forward.n_classes(model, few[0]) if says_what_it_ignores else None
    return ValueRanges(sizes, min(longest, default=None), n_classes, ignore_index, is_binary)


def _is_binary(model: Any, loss_fn: Any) -> bool:
    """Return whether the loss is known to be a binary cross entropy."""
    if loss_fn is None:
        return getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification"
    return isinstance(loss_fn, _BINARY_MODULES) or loss_fn in _BINARY_FUNCTIONS


def _short_rows(rows: Rows) -> list[int]:
    """Return the positions of a few short rows, of at least two tokens, among those that are looked at."""
    positions = sample_positions(rows)
    lengths = {position: length_of(row) for position, row in zip(positions, rows.fetch(positions), strict=True)}
    return sorted(positions, key=lambda position: (lengths[position] < 2, lengths[position]))[:_FEW]
