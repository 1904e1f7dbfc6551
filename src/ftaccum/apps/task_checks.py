"""What `ftaccum train`, `ftaccum search` and training scripts check before they load the model and the rows of a task.

The imports take seconds, so import this module after the command line is parsed.
"""

from collections.abc import Mapping
from typing import Any

from ..arguments import parse_settings
from ..errors import refuse
from ..runtime.accelerator import is_first_process
from ..settings.recipe import Recipe
from ..settings.runtime import Runtime
from ..tasks.arguments import TrainArguments, ValDataArguments, faults_of_val_data
from ..tasks.load import make_task
from ..training.adapters import fault_of_save
from ..training.config import faults_of_evaluation
from ..training.preflight import faults_before_loading
from .search.settings import SearchSettings
from .search.validation import check_before_loading


def check_training(named: TrainArguments, settings: Mapping[str, Any]) -> tuple[Recipe, Runtime]:
    """Check a run of a task before its model and rows are loaded, and return its settings with each value parsed.

    Args:
        named: the task, the model and the rows.
        settings: settings of `test_fine_tuning`, with `lora`.

    Raises:
        SettingsError: with the faults that can be found so far.
    """
    task = make_task(named)
    refuse(faults_before_loading(settings, looks_at_files=is_first_process()))
    recipe, runtime = parse_settings(settings)
    has_val_data, has_lora = named.val_data is not None, settings["lora"] is not None
    measures = bool(task.metrics) and (has_val_data or recipe.validation_split > 0)
    faults = [fault for fault in [fault_of_save(runtime.save, has_adapters=has_lora)] if fault]
    faults += faults_of_val_data(named)
    refuse(faults + faults_of_evaluation(recipe, has_metrics=measures, has_val_data=has_val_data))
    task.check(recipe)
    return recipe, runtime


def check_validation(named: ValDataArguments, settings: Mapping[str, Any]) -> None:
    """Check whether a script without a task has the validation rows that its settings need. It may have any metrics.

    Raises:
        SettingsError: with all faults.
    """
    recipe, _ = parse_settings(settings)
    has_val_data = named.val_data is not None
    faults = faults_of_evaluation(
        recipe, has_metrics=has_val_data or recipe.validation_split > 0, has_val_data=has_val_data
    )
    refuse(faults_of_val_data(named) + faults)


def check_search(named: TrainArguments, arguments: Mapping[str, Any]) -> None:
    """Check a search with a task before its model and rows are loaded, and compare it with its study, if any.

    Args:
        named: the task, the model and the rows.
        arguments: arguments of `search` without the model and the rows.

    Raises:
        SettingsError: with the faults that can be found so far.
    """
    task = make_task(named)
    refuse(faults_of_val_data(named))
    share = arguments["validation_split"]
    measures = bool(task.metrics) and (named.val_data is not None or share != 0)
    # The real metrics may need the tokenizer. Before it is loaded, it only matters whether there are any.
    check_before_loading({**arguments, "val_data": named.val_data, "compute_metrics": print if measures else None})
    varied = {"learning_rate", *SearchSettings.__dataclass_fields__}  # other meanings than in a run: `sampler`
    task.check(parse_settings({name: value for name, value in arguments.items() if name not in varied})[0])
