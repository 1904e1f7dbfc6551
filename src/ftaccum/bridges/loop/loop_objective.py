"""The loss of a loop that the user wrote, measured on rows of its first window."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import SettingsError
from ...objective.item_counts import Batch
from ...objective.loss_scale import find_divisor
from ...objective.model_forward import ModelForward
from ...objective.objective import Objective
from ...objective.self_check import measured_objective
from ...objective.warn_inexact import warn_if_inexact
from ...runtime.model_context import run_eagerly, without_autocast
from ...runtime.process_group import ProcessGroup
from ...runtime.wrapped_models import uncompiled, weights_differ
from ...training.build_plan import report_loss_scale
from ...training.declared import counter_of
from ..measured_batches import sample_of_window
from ..window_width import padding_of


@dataclass(frozen=True)
class LossArguments:
    """The arguments of `ExactAccumulation` about the loss, with the same names."""

    loss_fn: Callable[[Any, Any], Any] | None
    reduction: str
    count_items: Callable[[Any], Any] | None
    on_inexact: str


@dataclass(frozen=True)
class MeasuredLoss:
    """A measured loss.

    Attributes:
        objective: the loss, and how to count its items.
        fill: the padding of columns, the same on all processes.
        n_rows: the number of rows that were measured. One row does not show what a loss is a mean over.
    """

    objective: Objective
    fill: Mapping[str, int]
    n_rows: int


def measure_loss(
    inner: nn.Module, batches: Sequence[Batch], loss: LossArguments, process_group: ProcessGroup, at_least: int = 1
) -> MeasuredLoss | None:
    """Measure how the loss is counted, on a few rows of a window, and warn or raise if it is inexact.

    All processes measure the same rows, chosen from all of them.

    Args:
        inner: the model, without DDP.
        batches: this process's part of the window.
        at_least: the number of different rows that the measurement needs.

    Returns:
        The measured loss; None if fewer rows of the window have a label that counts, on all processes together.

    Raises:
        DataError, SettingsError: if the batches cannot be used, or the model gives no loss for them.
        InexactLossError: if the loss is inexact and `on_inexact` is "error".
    """
    model = uncompiled(inner)
    if weights_differ(model, process_group):
        raise SettingsError(
            [
                "The weights of `model` differ between processes. Load the same weights in all of them, or wrap the "
                "model in DistributedDataParallel (`accelerator.prepare`), which copies those of the first process."
            ]
        )
    fill = padding_of(model, loss.loss_fn, batches[0]) if batches else None
    fill = next((each for each in process_group.gather(fill) if each), {"input_ids": 0, "labels": -100})
    item_counter = counter_of(model, loss.loss_fn, fill["labels"])
    sample = sample_of_window(batches, item_counter, fill["input_ids"], process_group)
    n_rows = 0 if sample is None else len(set(sample.names))
    if sample is None or n_rows < at_least:
        return None
    with without_autocast(model), run_eagerly(model):
        forward = ModelForward(model, sample.together, loss.loss_fn, source="The loader")
        objective = measured_objective(
            model,
            forward,
            sample,
            item_counter=item_counter,
            count_items=loss.count_items,
            sums=loss.reduction == "sum",
        )
        divisor = find_divisor(model, objective, sample)
    warn_if_inexact(objective.report, loss.on_inexact, is_main=process_group.is_main)
    if process_group.is_main:
        report_loss_scale(divisor, {len(batches)})
    return MeasuredLoss(objective, fill, n_rows)
