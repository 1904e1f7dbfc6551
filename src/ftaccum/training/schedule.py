"""The schedule of the learning rate."""

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from ..errors import SettingsError
from ..settings.recipe import Recipe
from .rates import sets_its_own

_SET_HERE = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}  # not by `lr_scheduler_kwargs`


def faults_of_lr_scheduler(recipe: Recipe) -> list[str]:
    """Return a sentence for each fault of `lr_scheduler` and `lr_scheduler_kwargs`."""
    name, options = recipe.lr_scheduler, _options_of(recipe)
    known = _options_by_schedule()
    if name not in known:
        return [f"`lr_scheduler` must be one of {', '.join(map(repr, known))}, but is {name!r} instead."]
    taken = " and ".join(map(repr, known[name])) or "no options"
    if unknown := [key for key in options if key not in known[name]]:
        return [f"`lr_scheduler_kwargs` has {key!r}, but the schedule {name!r} takes {taken}." for key in unknown]
    problem = _problem_with(recipe)
    if problem is None:
        return []
    shown = f"`lr_scheduler_kwargs` is {options!r}" if options else "`lr_scheduler_kwargs` is None"
    return [f"{shown}, which the schedule {name!r} cannot use: {problem}. It takes {taken}."]


def make_schedule(
    recipe: Recipe, optimizer: Optimizer, peak: float, warmup_updates: int, n_updates: int
) -> LRScheduler:
    """Return the schedule of a recipe that has no `faults_of_lr_scheduler`. It scales the rate of each group.

    Args:
        peak: the learning rate that options such as `min_lr` and `lr_end` are compared with.
        warmup_updates, n_updates: lengths in updates.

    Raises:
        SettingsError: if the options do not suit the rate.
    """
    for group in optimizer.param_groups:
        if sets_its_own(group):
            group["lr"] = 0.0  # the schedule needs a number to multiply, but the optimizer does not read it
    try:
        with _default_rate(optimizer, peak):
            return get_scheduler(recipe.lr_scheduler, optimizer, warmup_updates, n_updates, _options_of(recipe))
    except (TypeError, ValueError) as error:
        raise SettingsError(
            [f"`lr_scheduler_kwargs` is {_options_of(recipe)!r}, which cannot be used at the rate {peak:g}: {error}."]
        ) from error


def cover_new_groups(schedule: LRScheduler) -> None:
    """Scale groups that a callback has added to the optimizer as well. Their rates are peaks, as those of the others.

    The schedules that a recipe may name have one factor for all groups.
    """
    new = schedule.optimizer.param_groups[len(schedule.base_lrs) :]
    if not new:
        return
    assert isinstance(schedule, LambdaLR), "all schedules that depend on nothing but the number of updates are"
    for group in new:
        if sets_its_own(group):
            group["lr"] = 0.0
        factor = schedule.lr_lambdas[0]
        peak = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
        group["initial_lr"] = peak
        group["lr"] = peak * factor(schedule.last_epoch)
        schedule.base_lrs.append(peak)
        schedule.lr_lambdas.append(factor)


def _options_of(recipe: Recipe) -> dict[str, Any]:
    options: Any = recipe.lr_scheduler_kwargs
    return dict(options or {})


@contextmanager
def _default_rate(optimizer: Optimizer, peak: float) -> Iterator[None]:
    """Set the default rate of an optimizer, which some schedules read instead of the rates of its groups."""
    defaults = vars(optimizer).setdefault("defaults", {})
    before = dict(defaults)
    defaults["lr"] = peak or 1.0
    try:
        yield
    finally:
        defaults.clear()
        defaults.update(before)


def _options_by_schedule() -> Mapping[str, list[str]]:
    """Return the options of each schedule that depends on nothing but the number of updates, by name."""
    found = {}
    for kind in SchedulerType:
        parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[kind]).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):  # those that follow a metric take any options
            found[kind.value] = [p.name for p in parameters if p.name not in _SET_HERE]
    return found


def _problem_with(recipe: Recipe) -> str | None:
    """Return why a schedule of a few updates cannot be computed; None if it can."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.learning_rate)
    try:
        schedule = get_scheduler(recipe.lr_scheduler, optimizer, 1, 4, _options_of(recipe))
        for _ in range(4):
            optimizer.step()
            schedule.step()
            (rate,) = schedule.get_last_lr()
            if not (isinstance(rate, float) and math.isfinite(rate) and rate >= 0):
                return f"the learning rate would be {rate}"
    except (TypeError, ValueError, ArithmeticError) as error:
        return str(error)
    return None
