"""Parse keyword arguments into a Recipe and a Runtime, and check them."""

import numbers
import os
from collections.abc import Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any, TypeVar

from .errors import refuse, shown
from .fields import rules_of
from .settings.recipe import CHANGEABLE, Recipe
from .settings.runtime import Runtime

T = TypeVar("T")


def parse_settings(given: Mapping[str, Any]) -> tuple[Recipe, Runtime]:
    """Sort keyword arguments into a Recipe and a Runtime.

    Args:
        given: settings by name. Missing settings take their defaults; other names are ignored.

    Raises:
        SettingsError: if any setting is invalid. Lists every fault, one sentence each.
    """
    recipe, runtime = read_settings(Recipe, given), read_settings(Runtime, given)
    # The joint rules compare values, so each value must be valid first.
    faults = find_faults(recipe) + find_faults(runtime) or _joint_faults(recipe, runtime)
    refuse(faults)
    return recipe, runtime


def _joint_faults(recipe: Recipe, runtime: Runtime) -> list[str]:
    unknown = [name for name in runtime.allow_changed if name not in CHANGEABLE]
    faults = {
        "`use_amp` is True, but `mixed_precision` is 'no'. "
        "Omit `mixed_precision` to choose bf16 or fp16 automatically, or drop `use_amp`.": (
            runtime.use_amp and runtime.mixed_precision == "no"
        ),
        f"`use_wandb` is True, but `log_with` is {shown(runtime.log_with)}. "
        "Use only one of the two; `log_with='all'` uses every installed tracker.": (
            runtime.use_wandb and runtime.log_with not in (None, "wandb")
        ),
        "`class_weights` and `sampler` are both 'balanced', so rare classes would count twice over. Set only one of "
        "them.": (recipe.class_weights == recipe.sampler == "balanced"),
        f"`warmup_steps` is {recipe.warmup_steps} and `warmup_ratio` is {recipe.warmup_ratio}. "
        "Set only one of the two.": (recipe.warmup_steps > 0 and recipe.warmup_ratio > 0),
        f"`early_stopping_min_delta` is {recipe.early_stopping_min_delta}, but `early_stopping_patience` is None, so "
        "training never stops early. Set the patience, or omit `early_stopping_min_delta`.": (
            recipe.early_stopping_min_delta > 0 and recipe.early_stopping_patience is None
        ),
        f"`self_check_cache` is {runtime.self_check_cache!r}, which is a file. Give a folder, True or False.": (
            isinstance(runtime.self_check_cache, str) and Path(runtime.self_check_cache).is_file()
        ),
        "`planner_costs` is given, but `planner` is False. Drop one of them.": (
            runtime.planner_costs is not None and not runtime.planner
        ),
        f"`allow_changed` contains {unknown}. It may contain only: {', '.join(CHANGEABLE)}.": bool(unknown),
        "`resume` is 'auto', but `output_dir` is None, so it cannot look for checkpoints. Set `output_dir`, or set "
        "`resume` to the folder of a checkpoint.": runtime.resume == "auto" and runtime.output_dir is None,
        f"`push_to_hub` is {runtime.push_to_hub!r}, but `output_dir` is None, so a failed upload would lose the model. "
        "Set `output_dir`: the model is saved there before it is uploaded.": (
            runtime.push_to_hub is not None and runtime.output_dir is None
        ),
    }
    found = [sentence for sentence, holds in faults.items() if holds]
    return found + _faults_of_auto(recipe, runtime) + faults_of_schedule(recipe)


def faults_of_schedule(recipe: Recipe) -> list[str]:
    """Return one sentence for each setting that contradicts a changing k or a constant k."""
    k, scaling = recipe.gradient_accumulation_steps, recipe.learning_rate_scaling
    if isinstance(k, int):
        if scaling == "none":
            return []
        return [
            f"`learning_rate_scaling` is {scaling!r}, but `gradient_accumulation_steps` is {k} throughout, so there "
            "is no change to follow. Set the steps to pairs, such as '0:2,100:8', or omit `learning_rate_scaling`."
        ]
    return [
        f"`gradient_accumulation_steps` is {k} and `{name}` is {getattr(recipe, name)}, but both set the size of every "
        "update. Set only one of the two."
        for name in ("effective_batch_size", "tokens_per_update")
        if getattr(recipe, name) is not None
    ]


def _faults_of_auto(recipe: Recipe, runtime: Runtime) -> list[str]:
    if runtime.batch_size != "auto":
        return []
    found = []
    if runtime.token_limit is not None:
        found.append(
            f"`batch_size` is 'auto', but `max_tokens` is {runtime.max_tokens}, which limits micro-batches by tokens, "
            "not rows. Set only one of them, or `max_tokens='auto'`."
        )
    if recipe.gradient_accumulation_steps != 1:
        found.append(
            f"`batch_size` is 'auto', which determines k, but `gradient_accumulation_steps` is "
            f"{recipe.gradient_accumulation_steps}. The size of an update must not depend on what fits in memory: set "
            "`effective_batch_size` or `tokens_per_update` instead."
        )
    elif not (recipe.effective_batch_size or recipe.tokens_per_update):
        found.append(
            "`batch_size` is 'auto', but the size of an update is not set. It must not depend on what fits in memory: "
            "add `tokens_per_update` or, for example, `effective_batch_size=32`."
        )
    return found


def read_settings(kind: type[T], given: Mapping[str, Any]) -> T:
    """Build a settings dataclass from the fields in `given`, and parse each value by its rule, if it has one."""
    rules = rules_of(kind)
    names = [name for name in kind.__dataclass_fields__ if name in given]  # type: ignore[attr-defined]
    return kind(**{n: rules[n].read(plain(given[n])) if n in rules else given[n] for n in names})


def valid_settings(kind: type[T], given: Mapping[str, Any]) -> T:
    """Do the same as `read_settings`, but give each setting that breaks its rule its default."""
    settings, rules = read_settings(kind, given), rules_of(kind)
    return kind(**{n: value for n, value in vars(settings).items() if rules[n].fault(n, value, "") is None})


def find_faults(settings: Any) -> list[str]:
    """Return one sentence for each field of a settings dataclass that breaks its rule."""
    declared = type(settings).__dataclass_fields__
    found = (
        rule.fault(name, getattr(settings, name), _remedy(declared[name]))
        for name, rule in rules_of(type(settings)).items()
    )
    return [fault for fault in found if fault]


def _remedy(declared: Field) -> str:
    default = "" if declared.default == "" else f"; the default is {declared.default!r}"  # "" if it is required
    return f"It means: {declared.metadata['help']}{default}."


def plain(value: Any) -> Any:
    """Convert NumPy numbers to Python numbers and paths to strings, and return any other value unchanged."""
    try:
        return _plain(value)
    except Exception:  # a list that contains itself, a fraction too large for a float, a tensor without storage, …
        return value


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if hasattr(value, "tolist"):  # a NumPy array
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else value
