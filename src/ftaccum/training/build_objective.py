"""The forward pass with its loss, and the objective: how the loss is counted, measured on a few rows."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..data.collator import RowCollator
from ..data.dataset import Rows
from ..errors import DataError, SettingsError
from ..objective.labelled_check import find_labelled_head
from ..objective.labelled_head import LabelledHead
from ..objective.last_layer import LastLayer
from ..objective.last_layer_check import find_last_layer
from ..objective.model_forward import ModelForward
from ..objective.objective import Objective
from ..objective.sample import Sample
from ..objective.self_check import measured_objective
from ..objective.self_check_cache import VerdictCache, is_plain
from ..objective.whole_rows import explains_whole_rows
from ..objective.window_check import window_objective
from ..objective.window_forward import WindowForward
from ..objective.window_loss import WindowLoss
from ..runtime.accelerator import compiles_models
from ..runtime.log import logger
from ..runtime.memory import is_out_of_memory
from ..runtime.sharding.launcher import find_sharding
from .build_cache import build_cache
from .class_loss import build_class_loss
from .config import RunConfig
from .declared import counter_of
from .loss_faults import loss_fault


def build_forward(config: RunConfig, batch: Any, rows: Rows) -> ModelForward:
    """Return the forward pass with the loss that the arguments define, before `class_weights` and similar settings."""
    components = config.components
    if config.recipe.loss_over == "window":
        assert components.loss_fn is not None, "refused with the settings"
        window_loss = WindowLoss(components.loss_fn, components.loss_inputs)
        window_loss.to(next(components.model.parameters()).device)
        return WindowForward(components.model, batch, window_loss)
    return ModelForward(components.model, batch, components.loss_fn, token_ids=rows.are_token_ids)


def build_objective(
    config: RunConfig,
    accelerator: Accelerator,
    forward: ModelForward,
    rows: Rows,
    row_collator: RowCollator,
    sample: Sample,
    labelled: list[int],
    ignore_index: int,
) -> tuple[ModelForward, Objective]:
    """Return the forward pass with the loss of training, and the measured objective.

    Args:
        forward: the forward pass before `class_weights` and similar settings.
        sample: the rows to measure on.
        labelled: positions of rows with labels that count, for messages.
        ignore_index: the label that the loss ignores.

    Raises:
        DataError: if the rows have no loss that can be measured.
        SettingsError: if the loss has no gradient, or the settings do not fit it.
    """
    components, recipe = config.components, config.recipe
    try:
        if isinstance(forward, WindowForward):
            return forward, window_objective(components.model, forward, sample)
        loss = build_class_loss(components, recipe, forward, rows, row_collator, sample.together, ignore_index)
        if loss is not None:
            forward = ModelForward(components.model, sample.together, loss)
        cache = build_cache(config, forward.loss_fn, sample, ignore_index)
        all_logits = _needs_all_logits(config, accelerator)
        measure = partial(_measure, config, ignore_index, cache, all_logits is None)
        short = sample.short if forward.is_own and config.runtime.audit else None
        forward, objective, sample = _measured(components.model, forward, short, sample, measure, cache)
    except (DataError, SettingsError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise loss_fault(components, forward, rows, row_collator, labelled, error) from error
    found: LabelledHead | str | None = all_logits or forward.labelled_head
    if found is None:
        found = find_labelled_head(components.model, sample, objective, ignore_index)
        if isinstance(found, LabelledHead) and cache is not None:
            cache.allow_labels(gives_logits=found.gives_logits)
    if isinstance(found, LabelledHead):
        forward.labelled_head = found
        found.chunks = not config.runtime.compile  # its graphs use none, so eager passes that measure memory must not
        logger.debug("Logits are computed at labelled positions only.")
    else:
        logger.debug(f"Logits are computed at all positions: {found}.")
        forward.last_layer = _last_layer(config, accelerator, sample, objective)
    return forward, objective


def _last_layer(config: RunConfig, accelerator: Accelerator, sample: Sample, objective: Objective) -> LastLayer | None:
    """Return the last layer if it is enough to compute it at the positions that are read; else None."""
    if config.runtime.loss_head == "full" or config.runtime.compile or compiles_models(accelerator):
        return None
    found = find_last_layer(config.components.model, sample, objective)
    if isinstance(found, LastLayer):
        logger.debug("The last layer is computed only at the positions that are read.")
        return found
    logger.debug(f"The last layer is computed at all positions: {found}.")
    return None


def _measured(
    model: nn.Module,
    forward: ModelForward,
    short: Sample | None,
    whole: Sample,
    measure: Callable[[ModelForward, Sample], Objective],
    cache: VerdictCache | None,
) -> tuple[ModelForward, Objective, Sample]:
    """Return the forward pass, the objective and the rows that it was measured on.

    The cut rows come first. If they show one exact mean, which explains the loss of the whole rows as well, they are
    enough: audits compare gradients of whole rows later. Any other finding may come from the cut, so the whole rows are
    measured instead.

    Args:
        short: the cut rows; None to measure whole ones at once.
        cache: where verdicts are kept.
    """
    if short is not None:
        tried = copy.deepcopy(forward)  # measuring changes it: where its loss is, its terms, its labelled head
        try:
            objective = measure(tried, short)
            is_enough = is_plain(objective.report) and explains_whole_rows(model, objective, whole, cache)
        except Exception as error:  # a model may need rows of one length
            if is_out_of_memory(error):
                raise  # whole rows do not fit either
            logger.debug(f"The self-check measures whole rows: cut ones raise {error!r}.")
        else:
            if is_enough:
                return tried, objective, short
            logger.debug("The self-check measures whole rows: cut ones do not show that the loss is one exact mean.")
    return forward, measure(forward, whole), whole


def _measure(
    config: RunConfig,
    ignore_index: int,
    cache: VerdictCache | None,
    tries_labels: bool,
    forward: ModelForward,
    sample: Sample,
) -> Objective:
    model = config.components.model
    return measured_objective(
        model,
        forward,
        sample,
        item_counter=counter_of(model, forward.loss_fn, ignore_index),
        count_items=config.components.count_items,
        sums=config.components.reduction == "sum",
        balances_window=config.recipe.router_balance == "window",
        cache=cache,
        is_audited=bool(config.runtime.audit) and not config.runtime.resume,
        tries_labels=tries_labels,
    )


def _needs_all_logits(config: RunConfig, accelerator: Accelerator) -> str | None:
    """Return the reason why all logits are computed, if the settings give one; else None."""
    if config.runtime.loss_head == "full":
        return "`loss_head` is 'full'"
    if compiles_models(accelerator):
        return "the launcher compiles the model"
    return "the model is compiled and sharded" if config.runtime.compile and _shards(config, accelerator) else None


def _shards(config: RunConfig, accelerator: Accelerator) -> bool:
    # FSDP2 must see the logits, so the graph would return them instead of computing the loss, and need more memory.
    try:
        return find_sharding(config.runtime, accelerator.num_processes) is not None
    except SettingsError:  # reported elsewhere, or ignored
        return False
