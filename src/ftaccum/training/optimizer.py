"""Parameter groups, optimizer, schedule."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from ..errors import SettingsError

ParamGroups = list[dict[str, Any]]
OptimizerFactory = Callable[[ParamGroups], Optimizer]


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient.

    Raises:
        SettingsError: where every parameter is frozen.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise SettingsError(["`model` has no trainable parameter: all have requires_grad=False. Unfreeze some."])
    return trainable


def parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float) -> ParamGroups:
    """The trainable parameters in two groups: those with weight decay, and biases and norms, without.

    Parameters of fewer than two dimensions are biases, norms' scales and the like; decaying them only shrinks what
    they scale (the usual practice since GPT-2 and BERT).

    Raises:
        SettingsError: where every parameter is frozen.
    """
    trainable = trainable_parameters(model)
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "lr": learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    model: nn.Module,
    optimizer: OptimizerFactory | Optimizer | None,
    learning_rate: float,
    weight_decay: float,
) -> Optimizer:
    """The user's optimizer, what their function makes of the parameter groups, or AdamW.

    Raises:
        SettingsError: where it is neither, or holds none of the model's trainable parameters.
    """
    made = optimizer
    if not isinstance(made, Optimizer):
        factory = _adamw if optimizer is None else optimizer
        made = factory(parameter_groups(model, learning_rate, weight_decay)) if callable(factory) else None
    if not isinstance(made, Optimizer):
        raise SettingsError(
            [
                "`optimizer` must be a torch Optimizer or a function of the parameter groups that returns one, but is "
                f"or returned {optimizer!r} instead. For example `optimizer=lambda groups: torch.optim.SGD(groups)`."
            ]
        )
    if not _held(made) & _ids(p for p in model.parameters() if p.requires_grad):
        raise SettingsError(
            [
                "`optimizer` holds none of the model's trainable parameters, so no update would change it. "
                "Build it from this model's parameters, or give a function of the parameter groups."
            ]
        )
    return made


def _adamw(groups: ParamGroups) -> Optimizer:
    # One kernel for all weights where the device has it: on a CPU, a fifth of the time of one operation after another.
    try:
        return torch.optim.AdamW(groups, fused=True)
    except RuntimeError:  # weights on a device without, or complex ones
        return torch.optim.AdamW(groups)


class CoupledBeta2:
    """Makes optimizers whose second moment forgets as fast in rows as it would at another batch size.

    At batch sizes B' and B, β2' = β2^(B'/B) keeps the half-life B · ln(1/2) / ln β2 (Marek et al. 2025,
    arXiv:2507.07101).

    Attributes:
        beta2: of the optimizer made last.
    """

    def __init__(self, factory: OptimizerFactory | None, ratio: float) -> None:
        """Args:
        factory: makes the optimizer; None for AdamW.
        ratio: B'/B, the batch size of the run in that for which the optimizer's own β2 is meant.
        """
        self._factory, self._ratio = factory or _adamw, ratio
        self.beta2: float | None = None

    def __call__(self, groups: ParamGroups) -> Optimizer:
        """Raises:
        SettingsError: where the optimizer has no β2.
        """
        optimizer = self._factory(groups)
        for group in optimizer.param_groups:
            if "betas" not in group:
                raise SettingsError(
                    [
                        f"`couple_beta2` is True, but {type(optimizer).__name__} has no `betas`. Leave it out, or use "
                        "an optimizer of Adam's kind."
                    ]
                )
            beta1, beta2 = group["betas"]
            self.beta2 = beta2**self._ratio
            group["betas"] = (beta1, self.beta2)
        return optimizer


@contextmanager
def preserve_learning_rates(optimizer: Optimizer) -> Iterator[None]:
    """Leaves an optimizer with the learning rates that it came with, whatever a schedule does to them."""
    before: list[dict[str, Any]] = [
        {name: group[name] for name in ("lr", "initial_lr") if name in group} for group in optimizer.param_groups
    ]
    try:
        yield
    finally:
        for group, rates in zip(optimizer.param_groups, before, strict=True):
            group.pop("initial_lr", None)
            group.update(rates)


@contextmanager
def scale_learning_rates(optimizer: Optimizer, factor: float) -> Iterator[None]:
    """Multiplies the learning rates for the time of one step. A schedule that goes on from the rate before finds it as
    it left it."""
    before = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, before, strict=True):
        group["lr"] = rate * factor
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate


def fault_of_schedule(name: str) -> str | None:
    """The sentence that says why `lr_scheduler` cannot be this name, or None."""
    usable = _usable_schedules()
    if name in usable:
        return None
    return f"`lr_scheduler` must be one of {', '.join(map(repr, usable))}, but is {name!r} instead."


def make_schedule(name: str, optimizer: Optimizer, warmup_updates: int, n_updates: int) -> LRScheduler:
    """A schedule by its name in Transformers, which `fault_of_schedule` has found usable, in updates."""
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_updates, num_training_steps=n_updates)


def _usable_schedules() -> list[str]:
    # Tried rather than listed: some of Transformers' schedules need arguments of their own, and a schedule on the
    # validation loss takes it at each step.
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


def _held(optimizer: Optimizer) -> set[int]:
    return _ids(p for group in optimizer.param_groups for p in group["params"])


def _ids(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {id(p) for p in parameters}
