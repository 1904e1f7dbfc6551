"""Checks of a run's settings that need neither its model nor its data, which may take minutes to load."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from ..arguments import parse_settings, valid_settings
from ..errors import SettingsError
from ..runtime.accelerator import find_trackers, requested_processes
from ..runtime.run_dir import RunDir
from ..settings.recipe import Recipe
from ..settings.runtime import Runtime
from ..tracking.hub import check_hub
from .adapters import faults_of_lora
from .build_plan import check_batch_sizes
from .config import own_optimizer
from .named_optimizers import faults_of_optimizer
from .schedule import faults_of_lr_scheduler


def faults_before_loading(given: Mapping[str, Any], *, looks_at_files: bool = True) -> list[str]:
    """Return a sentence for each fault of a run's settings that can be found without its model and data.

    Besides the rules of the settings, this checks `lora`, the optimizer, the schedule, the output folder, the trackers,
    the folder to resume from, the access to the hub, and the sizes of an update for the number of processes.

    Args:
        given: settings by name; missing ones take their defaults, and other names are ignored.
        looks_at_files: whether to check the folders and the hub, which only the main process uses.
    """
    faults = _faults_of(lambda: parse_settings(given))
    # A setting that breaks its rule is in `faults`. The others are checked as if it had its default.
    recipe, runtime = valid_settings(Recipe, given), valid_settings(Runtime, given)
    if not faults:
        faults += _faults_of(lambda: check_batch_sizes(recipe, runtime, requested_processes()))
    faults += faults_of_optimization(given)
    faults += faults_of_lora(given.get("lora"))
    faults += _faults_of(lambda: find_trackers(runtime, runtime.output_dir))
    if not looks_at_files:
        return faults
    faults += _faults_of_folders(runtime)
    repository = runtime.push_to_hub
    return faults or ([] if repository is None else _faults_of(lambda: check_hub(repository)))


def faults_of_optimization(given: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each fault of the optimizer's and the schedule's settings beyond the rule of each one."""
    recipe = valid_settings(Recipe, given)
    return faults_of_optimizer(recipe, own_optimizer(given)) + faults_of_lr_scheduler(recipe)


def _faults_of(check: Callable[[], Any]) -> list[str]:
    try:
        check()
    except SettingsError as error:
        return list(error.faults)
    return []


def _faults_of_folders(runtime: Runtime) -> list[str]:
    faults, folder, resume = [], runtime.output_dir, runtime.resume
    if folder is not None:
        faults += _faults_of(lambda: RunDir.resolve(folder).check())
    if resume not in (None, "auto") and not os.path.isdir(os.path.expanduser(resume)):
        faults.append(
            f"`resume` is {resume!r}, but there is no such folder. Set it to 'auto', or to the folder of a checkpoint "
            "or of a run that has checkpoints."
        )
    return faults
