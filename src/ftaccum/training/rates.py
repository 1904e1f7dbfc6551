"""Learning rates and weight decay: whether the settings or the optimizer set them, and which rate an update uses."""

import inspect
import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import refuse
from ..runtime.optimizers import inner_optimizers
from .named_options import NamedOptions

_LISTED = 3  # most numbers that the banner lists one by one
# The settings, and their names in parameter groups.
_NAMES = {"learning_rate": "lr", "weight_decay": "weight_decay"}


def settle_rates(optimizer: Optimizer, settings: dict[str, float], given: Collection[str], named: NamedOptions) -> None:
    """Set the learning rate and weight decay of an optimizer's groups to those that its constructor was called with.

    The groups that the user's function gets already contain the numbers of the settings, so `SGD(groups, lr=0.1)` would
    ignore 0.1.

    Args:
        optimizer: the optimizer that the user's function made.
        settings: the values of `learning_rate` and `weight_decay`.
        given: the names of those that the user gave.
        named: the options in the constructor calls of this optimizer and of those that it holds.

    Raises:
        SettingsError: if the user gave a number, and the optimizer was made with a different one.
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
    """Raise SettingsError if the user gave a learning rate or weight decay that no group of their optimizer has."""
    faults = []
    for name in sorted(given):
        own = {float(group[key]) for group in optimizer.param_groups if _is_number(group.get(key := _NAMES[name]))}
        if own and settings[name] not in own:
            numbers = " and ".join(f"{number:g}" for number in sorted(own))
            faults.append(_contradiction(name, settings[name], f"the {type(optimizer).__name__} has {numbers}"))
    refuse(faults)


def check_groups(optimizer: Optimizer, given: Collection[str]) -> None:
    """Raise SettingsError if a schedule cannot set the learning rates that the optimizer uses."""
    faults = []
    kind = type(optimizer).__name__
    if any(map(sets_its_own, optimizer.param_groups)) and "learning_rate" in given:
        faults.append(
            f"`learning_rate` is given, but {kind} has `relative_step=True` and sets its own learning rate. "
            "Leave one of them out."
        )
    if any(not sets_its_own(group) and not _is_number(group.get("lr")) for group in optimizer.param_groups):
        faults.append(
            f"A parameter group of {kind} has no numeric `lr`, which the learning rate schedule sets. Give every group "
            "an `lr`. An optimizer that wraps others must have the parameter groups of these as its `param_groups`."
        )
    own = {id(group) for group in optimizer.param_groups}
    for inner in inner_optimizers(optimizer):
        if any(id(group) not in own for group in inner.param_groups):
            faults.append(
                f"{kind} wraps {type(inner).__name__} but does not share its parameter groups, so the learning rate "
                f"schedule cannot change them. Put the same dicts into the `param_groups` of {kind}."
            )
    refuse(faults)


@dataclass(frozen=True)
class OptimizerSummary:
    """An optimizer, its peak learning rates and its weight decay.

    Attributes:
        kind: the name of its class.
        learning_rates: the peak learning rate of each group; None if the optimizer sets its own at each step.
        weight_decays: the weight decay of each group that has one.
        betas: its decay rates β₁ and β₂ in the first group; empty if it has none.
    """

    kind: str
    learning_rates: tuple[float, ...] | None
    weight_decays: tuple[float, ...]
    betas: tuple[float, ...] = ()

    def __str__(self) -> str:
        decay = f", weight decay {_listed(self.weight_decays)}" if self.weight_decays else ""
        return f"{self.kind}, learning rate {self._rates}{decay}"

    @property
    def _rates(self) -> str:
        """The peak learning rates, for people."""
        return "its own at each step (no schedule)" if self.learning_rates is None else _listed(self.learning_rates)

    def describe_kind(self) -> str:
        """Return the kind and the betas."""
        return self.kind + (f", betas {' and '.join(f'{beta:g}' for beta in self.betas)}" if self.betas else "")

    def named(self, *, exempts: bool) -> dict[str, str]:
        """Return the parts by name.

        Args:
            exempts: whether the groups without weight decay are the biases and norms.
        """
        positive = [decay for decay in self.weight_decays if decay] if exempts else self.weight_decays
        rest = ", 0 for biases and norms" if exempts and len(positive) < len(self.weight_decays) else ""
        return {
            "Optimizer": self.describe_kind(),
            "Peak learning rate": self._rates,
            **(
                {"Weight decay": f"{_listed(positive or [0.0])}{rest if positive else ''}"}
                if self.weight_decays
                else {}
            ),
        }


def summarize_optimizer(optimizer: Optimizer) -> OptimizerSummary:
    """Return the kind, the peak learning rates and the weight decay of an optimizer."""
    groups = optimizer.param_groups
    return OptimizerSummary(
        type(optimizer).__name__,
        None if any(map(sets_its_own, groups)) else tuple(float(group["lr"]) for group in groups),
        tuple(float(group["weight_decay"]) for group in groups if _is_number(group.get("weight_decay"))),
        tuple(float(beta) for beta in groups[0].get("betas") or ()),
    )


def peak_rates(optimizer: Optimizer) -> list[float | None]:
    """Return the peak learning rate of each group; None for a group whose rate the optimizer computes."""
    return [None if sets_its_own(group) else float(group["lr"]) for group in optimizer.param_groups]


def sets_its_own(group: dict[str, Any]) -> bool:
    """Return whether the optimizer computes the learning rate of a group itself (Transformers' Adafactor)."""
    return bool(group.get("relative_step"))


def rate_in_use(optimizer: Optimizer, factor: float) -> float:
    """Return the learning rate of the first group for the next step.

    At step t, Adafactor limits the rate to 1/√t, or computes it altogether. Its scaling by the size of each weight
    (`scale_parameter`) is not included.

    Args:
        optimizer: the optimizer.
        factor: multiplies the scheduled rate.
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
    """Restore the learning rates of an optimizer on exit, whatever a schedule does to them."""
    before: list[dict[str, Any]] = [
        {name: group[name] for name in ("lr", "initial_lr") if name in group} for group in optimizer.param_groups
    ]
    tensors = [(rate, rate.clone()) for rates in before for rate in rates.values() if isinstance(rate, Tensor)]
    try:
        yield
    finally:
        for n, group in enumerate(optimizer.param_groups):
            peak = group.pop("initial_lr", group.get("lr"))  # the rate with which a callback has added a group
            group.update(before[n] if n < len(before) else {"lr": peak})
        for rate, value in tensors:  # a schedule changes tensors in place
            rate.copy_(value)


@contextmanager
def scale_learning_rates(optimizer: Optimizer, factor: float) -> Iterator[None]:
    """Multiply the learning rates, and restore them on exit for schedules that compute each rate from the last one."""
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
    """Return whether an option's value is the default in the signature of the optimizer's class or its nearest base.

    Compare by identity, since a constructor may choose an equal value itself.
    """
    for kind in type(optimizer).__mro__:
        if issubclass(kind, Optimizer) and key in (options := inspect.signature(kind).parameters):
            return options[key].default is value
    return False


def _contradiction(name: str, wanted: float, other: str) -> str:
    return f"`{name}` is {wanted:g}, but {other}. Leave one of them out to make clear which one you mean."


def _listed(numbers: Iterable[float]) -> str:
    listed = dict.fromkeys(numbers)
    if len(listed) > _LISTED:
        return f"{min(listed):g} to {max(listed):g}"
    return " and ".join(dict.fromkeys(f"{number:g}" for number in listed))
