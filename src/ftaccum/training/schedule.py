"""The schedule of the learning rate."""

import inspect

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from .rates import sets_its_own


def fault_of_schedule(name: str) -> str | None:
    """Return a message that says why `lr_scheduler` cannot have this name, or None if it can."""
    usable = _usable_schedules()
    if name in usable:
        return None
    return f"`lr_scheduler` must be one of {', '.join(map(repr, usable))}, but is {name!r} instead."


def make_schedule(name: str, optimizer: Optimizer, warmup_updates: int, n_updates: int) -> LRScheduler:
    """Return the schedule with a name in Transformers that `fault_of_schedule` accepts. Lengths are in updates."""
    for group in optimizer.param_groups:
        if sets_its_own(group):
            group["lr"] = 0.0  # the schedule needs a number to multiply, but the optimizer does not read it
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_updates, num_training_steps=n_updates)


def _usable_schedules() -> list[str]:
    # Try each schedule: some need further arguments, and those that follow a metric take it in `step`.
    usable = []
    for kind in SchedulerType:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        try:
            schedule = get_scheduler(kind, optimizer, num_warmup_steps=1, num_training_steps=4)
        except (TypeError, ValueError):
            continue
        if all(p.default is not p.empty for p in inspect.signature(schedule.step).parameters.values()):
            usable.append(kind.value)
    return usable
