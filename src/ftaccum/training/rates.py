"""Learning rates and weight decay: whether the settings or the optimizer say them, and which rate an update used."""

import inspect
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import refuse
from ..runtime.optimizers import inner_optimizers
from .named_options import NamedOptions

# The settings, and the names that parameter groups have for them.
_NAMES = {"learning_rate": "lr", "weight_decay": "weight_decay"}


def settle_rates(optimizer: Optimizer, settings: dict[str, float], given: Collection[str], named: NamedOptions) -> None:
    """Give an optimizer that a function of the parameter groups has made the numbers that it was made with.

    The groups carry those of the settings, so that `SGD(groups, lr=0.1)` would leave 0.1 unused.

    Args:
        settings: `learning_rate` and `weight_decay`.
        given: those that the user gave.
        named: the options that the function named, of this optimizer and those that it holds.

    Raises:
        SettingsError: where the user gave one, and the optimizer was made with another.
    """
    faults = []
    for made in (optimizer, *inner_optimizers(optimizer)):
        for name, wanted in settings.items():
            own: Any = getattr(made, "defaults", {}).get(_NAMES[name])
            if not _is_number(own) or float(own) == wanted:
                continue
            key, groups = _NAMES[name], made.param_groups
            chosen = key in named.get(made, ()) or not _is_default_of_class(made, key, own)
            unset = [group for group in groups if group.get(key) is own]
            if (chosen or unset) and name in given:
                faults.append(_contradiction(name, wanted, f"{type(made).__name__} was made with `{key}={own:g}`"))
            elif chosen:
                for group in groups:
                    if group.get(key) == wanted:
                        group[key] = own
    refuse(faults)


def check_rates_of_instance(optimizer: Optimizer, settings: dict[str, float], given: Collection[str]) -> None:
    """Raise SettingsError where the user gave a rate or a decay that no group of their optimizer has."""
    faults = []
    for name in sorted(given):
        own = {float(group[key]) for group in optimizer.param_groups if _is_number(group.get(key := _NAMES[name]))}
        if own and settings[name] not in own:
            numbers = " and ".join(f"{number:g}" for number in sorted(own))
            faults.append(_contradiction(name, settings[name], f"the {type(optimizer).__name__} has {numbers}"))
    refuse(faults)


def check_groups(optimizer: Optimizer, given: Collection[str]) -> None:
    """Raise SettingsError where a schedule cannot set the rates that the optimizer's steps take."""
    faults = []
    kind = type(optimizer).__name__
    if any(map(sets_its_own, optimizer.param_groups)) and "learning_rate" in given:
        faults.append(
            f"`learning_rate` is given, but {kind} has `relative_step=True`, with which it sets its own. "
            "Leave one of them out."
        )
    if any(not sets_its_own(group) and not _is_number(group.get("lr")) for group in optimizer.param_groups):
        faults.append(
            f"A parameter group of {kind} has no number as `lr`, and the schedule sets that. Give one; an optimizer "
            "that holds others has theirs as its `param_groups`."
        )
    own = {id(group) for group in optimizer.param_groups}
    for inner in inner_optimizers(optimizer):
        if any(id(group) not in own for group in inner.param_groups):
            faults.append(
                f"{kind} holds {type(inner).__name__}, whose parameter groups are not its own, so that the schedule "
                "does not reach them. Have its `param_groups` be those of the optimizers that it holds."
            )
    refuse(faults)


def describe_rates(optimizer: Optimizer) -> str:
    """Return a line for the banner: the optimizer, its peak rates and its weight decay."""
    groups = optimizer.param_groups
    rates = "its own" if any(map(sets_its_own, groups)) else _listed(group["lr"] for group in groups)
    decays = [group["weight_decay"] for group in groups if _is_number(group.get("weight_decay"))]
    decay = f", weight decay {_listed(decays)}" if decays else ""
    steps = " at each step (no schedule)" if rates == "its own" else ""
    return f"Optimizer: {type(optimizer).__name__}, learning rate {rates}{steps}{decay}"


def peak_rates(optimizer: Optimizer) -> list[float | None]:
    """Return the rate of each group; None where the optimizer sets it."""
    return [None if sets_its_own(group) else float(group["lr"]) for group in optimizer.param_groups]


def sets_its_own(group: dict[str, Any]) -> bool:
    """Return whether the optimizer computes the rate of a group and ignores its `lr` (Transformers' Adafactor)."""
    return bool(group.get("relative_step"))


def rate_in_use(optimizer: Optimizer, factor: float) -> float:
    """Return the rate of the first group for the next step.

    Adafactor bounds it by 1/√t, or computes it altogether; how it then scales each weight's rate by the weight's own
    size (`scale_parameter`) is no part of it.

    Args:
        factor: of the scheduled rate.
    """
    group = optimizer.param_groups[0]
    holders = [o for o in (optimizer, *inner_optimizers(optimizer)) if any(g is group for g in o.param_groups)]
    holder = holders[-1]
    if not sets_its_own(group) and not isinstance(holder, torch.optim.Adafactor):
        return float(group["lr"]) * factor  # it may be a tensor
    step = float(holder.state.get(group["params"][0], {}).get("step", 0)) + 1
    if sets_its_own(group):
        largest = 1e-6 * step if group.get("warmup_init") else 1e-2
    else:
        largest = float(group["lr"]) * factor
    return min(largest, 1 / math.sqrt(step))


@contextmanager
def preserve_learning_rates(optimizer: Optimizer) -> Iterator[None]:
    """Leave an optimizer with the learning rates that it came with, whatever a schedule does to them."""
    before: list[dict[str, Any]] = [
        {name: group[name] for name in ("lr", "initial_lr") if name in group} for group in optimizer.param_groups
    ]
    tensors = [(rate, rate.clone()) for rates in before for rate in rates.values() if isinstance(rate, Tensor)]
    try:
        yield
    finally:
        for group, rates in zip(optimizer.param_groups, before, strict=True):
            group.pop("initial_lr", None)
            group.update(rates)
        for rate, value in tensors:  # a schedule writes into them
            rate.copy_(value)


@contextmanager
def scale_learning_rates(optimizer: Optimizer, factor: float) -> Iterator[None]:
    """Multiply the learning rates for the time of one step. A schedule that continues from the rate before finds it
    unchanged."""
    before = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, before, strict=True):
        group["lr"] = rate * factor
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Tensor)


def _is_default_of_class(optimizer: Optimizer, key: str, value: Any) -> bool:
    """Return whether a value is the default in the signature of the class, or of the nearest base class that has one:
    the very object, as an equal one may be chosen in the constructor."""
    for kind in type(optimizer).__mro__:
        if issubclass(kind, Optimizer) and key in (options := inspect.signature(kind).parameters):
            return options[key].default is value
    return False


def _contradiction(name: str, wanted: float, other: str) -> str:
    return f"`{name}` is {wanted:g}, but {other}. Leave one of them out, so that it is clear which one is meant."


def _listed(numbers: Any) -> str:
    return " and ".join(dict.fromkeys(f"{float(number):g}" for number in numbers))
