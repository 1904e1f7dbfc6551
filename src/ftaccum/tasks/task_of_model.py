"""Find the task of a saved model by the class of its head."""

import json
from pathlib import Path

from transformers import PretrainedConfig

from ..errors import SettingsError
from ..runtime.library_output import library_bars
from ..runtime.log import logger
from ..tracking.auto_classes import AutoClass, auto_class_named, auto_class_of_adapters
from ..tracking.saved_model import ADAPTER
from .arguments import TASKS
from .model_names import check_name
from .task_classes import task_class


def find_task(run: str, model: str) -> str:
    """Return the task that the head of a model is for, and log it.

    Args:
        run: the folder or name that the user gave, for messages.
        model: the folder or the hub name of the model, or a folder of adapters.

    Raises:
        SettingsError: if there is no such model or task, or if several tasks have the same head.
    """
    check_name("RUN", model)
    auto_class = _auto_class(model)
    found = [] if auto_class is None else [task for task in TASKS if _has_head(task, auto_class)]
    if len(found) != 1:
        head = f": it has the head of {' and '.join(found)}" if found else ""
        raise SettingsError(
            [
                f"{run!r} does not say what task its model was trained for{head}. Give `--task`, one of "
                f"{', '.join(found or TASKS)}."
            ]
        )
    logger.info(f"The head of the model is one for {found[0]}. `--task` chooses another task.")
    return found[0]


def _auto_class(model: str) -> AutoClass | None:
    """Return the auto class that loads a model or the base of adapters; None if its config does not tell."""
    adapter = Path(model) / ADAPTER
    try:
        if adapter.is_file():
            return auto_class_of_adapters(json.loads(adapter.read_text())["task_type"])
        with library_bars(shown=False):
            names = PretrainedConfig.get_config_dict(model)[0]["architectures"]
        return next((found for name in names if (found := auto_class_named(name)) is not None), None)
    except Exception:  # of many types: no such model, no network, a config of another kind
        return None


def _has_head(task: str, auto_class: AutoClass) -> bool:
    return task_class(task).model_class.__name__ == auto_class.name
