"""The two terms of the loss of a question-answering head: half its mean over starts and half its mean over ends.

Such a head ignores positions beyond the width of the batch, separately for starts and ends. So the two means may run
over different numbers of rows, and no single count weights their sum correctly.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .item_counts import Batch

_SPANS = {"start_positions": "start_logits", "end_positions": "end_logits"}
_EQUAL = 1e-6  # relative; both sides compute the same sums in the same way

WITHIN = "answers within the padded length"


def span_losses(outputs: Any, batch: Batch) -> dict[str, Tensor] | None:
    """Return half the mean loss of the starts and half that of the ends, by column; None for other heads."""
    if not isinstance(outputs, Mapping) or not isinstance(batch, Mapping):
        return None
    means = {}
    for column, logits in _SPANS.items():
        logits_BL, positions = outputs.get(logits), batch.get(column)
        if logits_BL is None or positions is None or logits_BL.shape != _ids_of(batch).shape:
            return None
        width = logits_BL.shape[1]
        positions_B = positions.reshape(-1).clamp(0, width).to(logits_BL.device)
        means[column] = F.cross_entropy(logits_BL, positions_B, ignore_index=width) / 2
    return means


def is_span_loss(outputs: Any, loss: Tensor, batch: Batch) -> bool:
    """Return whether a head's own loss is the sum of `span_losses`."""
    losses = span_losses(outputs, batch)
    return losses is not None and math.isclose(
        sum(part.item() for part in losses.values()), loss.item(), rel_tol=_EQUAL
    )


def span_counts() -> dict[str, Callable[[Batch], int]]:
    """Return functions that count the items of a batch for each of `span_losses`."""
    return {column: partial(_within, column) for column in _SPANS}


def _within(column: str, batch: Batch) -> int:
    return int((batch[column] < _ids_of(batch).shape[1]).sum())


def _ids_of(batch: Batch) -> Tensor:
    return batch["input_ids"]
