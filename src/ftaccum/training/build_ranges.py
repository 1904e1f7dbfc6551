"""The ranges of numbers that a model and its loss accept, found by forward passes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..data.collator import RowCollator
from ..data.dataset import Rows
from ..data.probe_rows import sample_positions
from ..data.row import length_of
from ..data.value_ranges import ValueRanges
from ..objective.batch_changes import fresh_batch_for
from ..objective.embedding_limits import EmbeddingLimits, find_embedding_limits
from ..objective.index_guard import IndexGuard
from ..objective.item_counts import Batch, targets_of
from ..objective.model_forward import ModelForward, n_classes_in
from ..objective.own_loss import logits_of
from ..objective.window_forward import WindowForward
from ..runtime.state_guards import inspection_mode
from .config import Components

_FEW = 3
_SAME = 1e-3  # relative difference up to which two losses are equal, also in 16 bits
_BINARY_MODULES = (nn.BCELoss, nn.BCEWithLogitsLoss)
_NO_PROBABILITIES = (2.0, -1.0, -100.0)
_BINARY_FUNCTIONS = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)


def find_ranges(
    components: Components, forward: ModelForward, rows: Rows, row_collator: RowCollator, ignore_index: int
) -> ValueRanges:
    """Return the ranges of the numbers in a batch.

    A `loss_fn` without an attribute `ignore_index` may accept any label, so its labels have no range.
    """
    model, loss_fn = components.model, components.loss_fn
    sizes, lengths = dict(ValueRanges.of_tokens(model).limits), []
    few, tried = _tried_rows(forward, model, rows, row_collator)
    for each in tried:
        sizes |= each.limits.sizes
        lengths += [] if each.limits.longest is None else [each.limits.longest]
    with inspection_mode(model, *forward.modules), IndexGuard():
        is_binary = _is_binary_module(loss_fn) or (loss_fn is None and _computes_binary(forward, model, few[0]))
        n_classes = None
        if loss_fn is None or hasattr(loss_fn, "ignore_index"):  # it says what it ignores
            n_classes = n_classes_in(tried[-1].outputs, tried[-1].row) or forward.n_classes(model, few[0])
    longest = min(lengths, default=None)
    # Run at most once, when the first longer row comes: no pass gets wider than the data require.
    takes_longer = cache(lambda: longest is None or _takes_any(forward, model, few, longest + 1))
    return ValueRanges(sizes, longest, takes_longer, n_classes, ignore_index, is_binary)


@dataclass(frozen=True)
class _Trial:
    """A row on which a forward pass was tried.

    Attributes:
        row: the row as a batch.
        limits: the limits of the embeddings that the pass has reached.
        outputs: what the model returned; None if the pass failed.
    """

    row: Batch
    limits: EmbeddingLimits
    outputs: Any

    @classmethod
    def of(cls, forward: ModelForward, model: nn.Module, row: Batch) -> "_Trial":
        """Run a pass of a row, and restore what it changes in the model."""
        outputs: list[Any] = []
        with inspection_mode(model, *forward.modules), IndexGuard():
            limits = find_embedding_limits(lambda: outputs.append(_run(forward, model, row)), row)
        return cls(row, limits, outputs[0] if outputs else None)


def _tried_rows(
    forward: ModelForward, model: nn.Module, rows: Rows, row_collator: RowCollator
) -> tuple[list[Batch], list[_Trial]]:
    """Return a few short rows, and those of them that were tried, up to the first whose pass succeeds.

    A successful pass reaches the embeddings that its row uses. A failed one ends at a faulty number of its row, so
    another row follows.
    """
    tried: list[_Trial] = []
    cut, whole = _few_rows(forward, rows, row_collator)
    if cut:
        few = [fresh_batch_for(model, row) for row in cut]
        if (first := _Trial.of(forward, model, few[0])).outputs is not None:
            return few, [first]
    few = [fresh_batch_for(model, row) for row in whole()]
    for row in few:
        tried.append(_Trial.of(forward, model, row))
        if tried[-1].outputs is not None:
            break
    return few, tried


def _takes_any(forward: ModelForward, model: nn.Module, few: Sequence[Batch], length: int) -> bool:
    """Return whether the forward pass of any of these rows succeeds at the given length."""
    return any(_takes(forward, model, _stretched(row, length)) for row in few)


def _takes(forward: ModelForward, model: nn.Module, row: Batch) -> bool:
    """Return whether the forward pass of a row succeeds."""
    try:
        with inspection_mode(model, *forward.modules), IndexGuard():
            _run(forward, model, row)
    except Exception:
        return False
    return True


def _run(forward: ModelForward, model: nn.Module, row: Batch) -> Any:
    """Run a forward pass with its loss, unless the loss reads all rows of a window, which one row does not show.

    Returns:
        The model's outputs.
    """
    return forward.outputs(model, row) if isinstance(forward, WindowForward) else forward(model, row)[1]


def _stretched(row: Batch, length: int) -> Batch:
    """Return a row with its tokens repeated up to the given length."""
    width = row["input_ids"].shape[-1]

    def stretch(column: Any) -> Any:
        if not isinstance(column, Tensor) or column.ndim != 2 or column.shape[-1] != width:
            return column
        return column.repeat(1, -(-length // width))[:, :length]

    return {name: stretch(column) for name, column in row.items()}


def _is_binary_module(loss_fn: Any) -> bool:
    """Return whether a loss is one of PyTorch's binary cross entropies."""
    return isinstance(loss_fn, _BINARY_MODULES) or loss_fn in _BINARY_FUNCTIONS


def _computes_binary(forward: ModelForward, model: nn.Module, row: Batch) -> bool:
    """Return whether the model's own loss is a binary cross entropy that ignores no label, whatever its value."""
    labels = targets_of(row)
    if labels is None or not labels.is_floating_point() or not isinstance(row, Mapping):
        return False
    for number in (1.0, *_NO_PROBABILITIES):
        changed = labels.clone()
        changed.view(-1)[0] = number
        try:
            means, outputs = forward(model, {**row, "labels": changed})
            expected = F.binary_cross_entropy_with_logits(logits_of(outputs), changed)
        except Exception:  # the outputs have no logits, or logits of another shape
            return False
        if not math.isclose(sum(map(float, means.values())), float(expected), rel_tol=_SAME):
            return False
    return True


def _few_rows(
    forward: ModelForward, rows: Rows, row_collator: RowCollator
) -> tuple[list[Batch], Callable[[], list[Batch]]]:
    """Return the shortest sampled rows, each as a batch. Prefer rows of at least two tokens.

    Returns:
        The rows cut to a few tokens; none if they must stay whole. And a function that returns them whole, for a model
        that does not take cut ones.
    """
    positions = sample_positions(rows)
    lengths = {position: length_of(row) for position, row in zip(positions, rows.fetch(positions), strict=True)}
    few = sorted(positions, key=lambda position: (lengths[position] < 2, lengths[position]))[:_FEW]
    short = row_collator.shortened(rows, few) if forward.is_own else None
    cut = [] if short is None else [row_collator.seeded(short, [place], 0) for place in range(len(short))]
    return cut, lambda: [row_collator.seeded(rows, [position], 0) for position in few]
