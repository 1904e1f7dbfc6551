"""A check whether a user's loss is the model's own loss divided by a whole number, such as the accumulation steps."""

import math
from collections.abc import Iterator, Mapping

from torch import nn

from ..runtime.state_guards import inspection_mode
from .batch_changes import fresh_batch_for
from .index_guard import IndexGuard
from .item_counts import Batch
from .model_forward import ModelForward, is_label
from .objective import Objective
from .perturbation import perturb_head
from .sample import Sample

_WITHIN = 1e-3  # relative


def find_divisor(model: nn.Module, objective: Objective, sample: Sample) -> int | None:
    """Return the whole number, at least 2, by which the loss is smaller than the model's own on the same rows.

    Return None if the model computes no loss of its own, if the loss is that one, or if their ratio is another number
    or differs between batches. This takes two forward passes of four rows or, if the first ratio is a whole number, at
    most eight. Generators, buffers and modes are restored.

    Args:
        model: the model on its device, before it is wrapped.
        objective: the measured loss.
        sample: the rows to compare on.
    """
    together = sample.together
    if (
        objective.report.own_loss
        or objective.window is not None
        or not isinstance(together, Mapping)
        or not any(map(is_label, together))
    ):
        return None
    try:
        own = ModelForward(model, together, None)
        with inspection_mode(model, *objective.modules), perturb_head(model), IndexGuard():
            ratios = (_ratio(model, own, objective, batch) for batch in (together, *sample.separate(together)))
            return _whole_number(ratio for ratio in ratios if ratio is not None)
    except Exception:  # the model computes no loss from these labels, which are for `loss_fn`
        return None


def _ratio(model: nn.Module, own: ModelForward, objective: Objective, batch: Batch) -> float | None:
    """Return the model's own loss of a batch, divided by the user's; None if one of them has no items or is 0."""
    theirs = own.unweighted_loss(model, fresh_batch_for(model, batch)).item()
    ours = objective.unweighted_loss(model, fresh_batch_for(model, batch), objective.count(batch)).item()
    return theirs / ours if ours and math.isfinite(theirs) and math.isfinite(ours) else None


def _whole_number(ratios: Iterator[float]) -> int | None:
    """Return the whole number that all ratios are, if it is at least 2 and there are several ratios."""
    first = next(ratios, 0.0)
    number = round(first)
    if number < 2 or abs(first / number - 1) > _WITHIN:
        return None
    others = [abs(ratio / first - 1) <= _WITHIN for ratio in ratios]
    return number if others and all(others) else None
