"""The optimizers that have a name, each from its usual library."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from ..errors import SettingsError
from ..settings.recipe import Recipe
from .muon import MuonWithAdamW
from .parameter_groups import ParameterGroup

_BETAS = ("adam_beta1", "adam_beta2")


def _adamw(groups: Sequence[ParameterGroup]) -> Optimizer:
    # `fused` updates all weights in one kernel, which on a CPU takes a fifth of the time. It rejects complex weights.
    is_real = all(p.is_floating_point() for group in groups for p in group.params)
    dicts = [group.as_dict() for group in groups]
    return torch.optim.AdamW(dicts, fused=True) if is_real else torch.optim.AdamW(dicts)


def _muon(groups: Sequence[ParameterGroup]) -> Optimizer:
    hidden, others = ([group.as_dict() for group in groups if group.is_hidden is wanted] for wanted in (True, False))
    return MuonWithAdamW(hidden, others)


def _from_library(module: str, kind: str) -> Callable[[Sequence[ParameterGroup]], Optimizer]:
    """Return a function that makes an optimizer of a class that a module has."""

    def make(groups: Sequence[ParameterGroup]) -> Optimizer:
        return getattr(importlib.import_module(module), kind)([group.as_dict() for group in groups])

    return make


@dataclass(frozen=True)
class NamedOptimizer:
    """An optimizer that has a name.

    Attributes:
        make: makes it from parameter groups.
        has_betas: whether it, or a part of it, has `betas`.
        package: the package to install, and the module to import from it; empty for torch's own.
    """

    make: Callable[[Sequence[ParameterGroup]], Optimizer]
    has_betas: bool = True
    package: str = ""
    module: str = ""

    @classmethod
    def of(cls, kind: str, package: str, module: str) -> "NamedOptimizer":
        """Return the optimizer of a class in a package other than torch."""
        return cls(_from_library(module, kind), package=package, module=module.partition(".")[0])


NAMED = {
    "adamw": NamedOptimizer(_adamw),
    "sgd": NamedOptimizer(_from_library("torch.optim", "SGD"), has_betas=False),
    "adafactor": NamedOptimizer(_from_library("torch.optim", "Adafactor"), has_betas=False),
    "lion": NamedOptimizer.of("Lion", "lion-pytorch", "lion_pytorch"),
    "muon": NamedOptimizer(_muon),
    "adamw_8bit": NamedOptimizer.of("AdamW8bit", "bitsandbytes", "bitsandbytes.optim"),
    "paged_adamw_8bit": NamedOptimizer.of("PagedAdamW8bit", "bitsandbytes", "bitsandbytes.optim"),
    "schedule_free_adamw": NamedOptimizer.of("AdamWScheduleFree", "schedulefree", "schedulefree"),
}


def make_named(recipe: Recipe, groups: Sequence[ParameterGroup]) -> Optimizer:
    """Return the optimizer that a recipe names, AdamW if it names none, with the recipe's β1 and β2.

    Raises:
        SettingsError: if the optimizer cannot be made for these parameters.
    """
    try:
        made = NAMED[recipe.optimizer or "adamw"].make(groups)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingsError(
            [f"`optimizer` is {recipe.optimizer!r}, which does not take the model's parameters: {error}."]
        ) from error
    for group in made.param_groups:
        if "betas" in group:
            betas = zip((recipe.adam_beta1, recipe.adam_beta2), group["betas"], strict=True)
            group["betas"] = tuple(own if given is None else given for given, own in betas)
    return made


def faults_of_optimizer(recipe: Recipe, own: Any) -> list[str]:
    """Return a sentence for each fault of the optimizer's settings that can be found without the model.

    Args:
        own: the user's optimizer or function; None if the recipe names the optimizer.
    """
    if own is not None:
        return _faults_of_own(recipe, own)
    name = recipe.optimizer or "adamw"
    named, faults = NAMED[name], []
    if fault := _fault_of_library(name, named):
        faults.append(fault)
    given = [beta for beta in _BETAS if getattr(recipe, beta) is not None]
    if not named.has_betas:
        having = ", ".join(repr(each) for each, optimizer in NAMED.items() if optimizer.has_betas)
        faults += [
            f"`{beta}` is {getattr(recipe, beta)}, but {name!r} has no betas. Leave it out, or set `optimizer` to one "
            f"of {having}."
            for beta in given
        ]
    if name == "schedule_free_adamw" and recipe.adam_beta1 == 0:
        faults.append("`adam_beta1` is 0, but 'schedule_free_adamw' divides by it. Give a number above 0.")
    return faults


def _faults_of_own(recipe: Recipe, own: Any) -> list[str]:
    faults = [
        f"`{beta}` is {getattr(recipe, beta)}, but `optimizer` is not a name. Give your optimizer its betas directly, "
        "such as `lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95))`."
        for beta in _BETAS
        if getattr(recipe, beta) is not None
    ]
    if not isinstance(own, Optimizer):
        return faults
    return faults + [
        f"`{name}` is given, but `optimizer` is an instance, which has its own parameter groups. Give a name or a "
        "function of the groups, or set the rates in your optimizer."
        for name in ("layerwise_lr_decay", "head_learning_rate", "optimizer_groups")
        if getattr(recipe, name) is not None
    ]


def _fault_of_library(name: str, named: NamedOptimizer) -> str | None:
    """Return a sentence if the library of an optimizer is missing or broken."""
    if not named.module:
        return None
    try:
        importlib.import_module(named.module)
    except ModuleNotFoundError as error:
        if error.name == named.module:
            return (
                f"`optimizer` is {name!r}, which needs the package {named.package}. Install it with "
                f"`pip install {named.package}`, or with `pip install 'ftaccum[optimizers]'`."
            )
        return _broken(name, named, error)
    except Exception as error:  # a library that was built for another device may raise anything
        return _broken(name, named, error)
    return None


def _broken(name: str, named: NamedOptimizer, error: Exception) -> str:
    return f"`optimizer` is {name!r}, but its package {named.package} cannot be imported: {error}. Reinstall it."
