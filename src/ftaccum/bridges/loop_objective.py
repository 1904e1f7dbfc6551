"""The loss of a loop that the user wrote, measured on rows of its first window."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..errors import SettingsError
from ..objective.item_counts import Batch, ItemCounter, targets_of
from ..objective.loss_scale import find_divisor
from ..objective.model_forward import ModelForward
from ..objective.objective import Objective
from ..objective.self_check import measured_objective
from ..objective.warn_inexact import warn_if_inexact
from ..runtime.model_context import run_eagerly, without_autocast
from ..runtime.process_group import ProcessGroup
from ..runtime.wrapped_models import uncompiled, weights_differ
from ..training.build_plan import report_loss_scale
from ..training.declared import class_weights_of, declared_ignore_index
from .measured_batches import CollatedRow, sample_of_rows, unlike_rows


@dataclass(frozen=True)
class LossArguments:
    """The arguments of `ExactAccumulation` about the loss, with the same names."""

    loss_fn: Callable[[Any, Any], Any] | None
    reduction: str
    count_items: Callable[[Any], Any] | None
    on_inexact: str


def padding_of(model: nn.Module, loss_fn: Any, batch: Batch) -> dict[str, int]:
    """Return the padding of columns: the model's padding token, and the label that the loss ignores."""
    config: Any = getattr(model, "config", None) or SimpleNamespace()
    targets, pad_token_id = targets_of(batch), getattr(config, "pad_token_id", None)
    of_pixels = loss_fn is None and targets is not None and targets.ndim > 2
    ignore_index = declared_ignore_index(model, loss_fn, config, of_pixels=of_pixels)
    return {"input_ids": pad_token_id if isinstance(pad_token_id, int) else 0, "labels": ignore_index}


def measure_loss(
    inner: nn.Module, batches: Sequence[Batch], loss: LossArguments, process_group: ProcessGroup
) -> Objective | None:
    """Measure how the loss is counted, on a few rows of a window, and warn or raise if it is inexact.

    All processes measure the same rows, chosen from all of them.

    Args:
        inner: the model, without DDP.
        batches: this process's part of the window.

    Returns:
        The objective; None if no row of the window has a label that counts, on any process.

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
    item_counter = ItemCounter(fill["labels"], class_weights_of(model, loss.loss_fn))
    own = process_group.run_on_all(lambda: unlike_rows(batches, item_counter))
    sample = sample_of_rows(_named(process_group.gather(own)), fill["labels"], fill["input_ids"])
    if sample is None:
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
    return objective


def one_width(batches: Sequence[Batch], process_group: ProcessGroup) -> int:
    """Return the token positions of the widest batch of a window, on all processes; 0 if there are no tokens.

    Raises:
        SettingsError: on all processes, if a batch is padded on the left, where more padding would move its tokens.
    """
    ids = [batch["input_ids"] for batch in batches if "input_ids" in batch]
    masks = [batch["attention_mask"] for batch in batches if batch.get("attention_mask") is not None]
    is_left = any(mask.ndim == 2 and not bool(torch.as_tensor(mask)[:, 0].all()) for mask in masks)
    if process_group.any(is_left):
        raise SettingsError(
            [
                "Padding changes the loss of this model, so all rows of a window must have one length. But these rows "
                "are padded on the left. Set `tokenizer.padding_side = 'right'`."
            ]
        )
    return max(process_group.gather(max((each.shape[-1] for each in ids), default=0)))


def _named(rows: Sequence[Sequence[CollatedRow]]) -> list[CollatedRow]:
    """Return the rows of all processes. With several processes, name the process of each."""
    if len(rows) == 1:
        return list(rows[0])
    named = ([replace(row, name=f"{row.name} of process {rank}") for row in own] for rank, own in enumerate(rows))
    return list(chain.from_iterable(named))
