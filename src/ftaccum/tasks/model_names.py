"""The folder or the repository on the hub that the name of a model stands for, and errors if there is none."""

from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.utils.hub import cached_file

from ..errors import SettingsError
from ..tracking.auto_classes import AUTO_CLASSES
from ..tracking.saved_model import ADAPTER
from .arguments import TASKS
from .reading.sources import HUB_NAME, did_you_mean
from .task_classes import task_class


def check_name(option: str, name: str, revision: str | None = None, *, asks_hub: bool = True) -> None:
    """Raise SettingsError if a name is neither a folder nor a model on the hub.

    Args:
        option: the option that gives the name, for messages.
        revision: the revision on the hub; None for the main one.
        asks_hub: whether to ask the hub, once, for a name that it may have.
    """
    path = Path(name).expanduser()
    if path.exists():
        return
    if name.startswith((".", "~")) or not HUB_NAME.fullmatch(name):
        raise SettingsError([f"`{option}` {name!r}: {missing_folder(path)}"])
    if not asks_hub:
        return
    try:
        cached_file(name, "config.json", revision=revision)
    except OSError as error:
        if _is_of_absence(error) and not isinstance(try_to_load_from_cache(name, ADAPTER), str):
            of_revision = f" with the revision {revision!r}" if revision else ""
            raise SettingsError(
                [
                    f"`{option}` {name!r}: there is no such folder here, and the hub cannot be reached or has no such "
                    f"model{of_revision}. {did_you_mean(path, folders_only=True) or 'Check the name.'}"
                ]
            ) from error


def missing_folder(path: Path) -> str:
    """Return a sentence on a folder that is not there, with similar names."""
    if not path.parent.is_dir():
        return f"there is no folder {str(path.parent)!r}. Check the path."
    return f"there is no such folder. {did_you_mean(path, folders_only=True) or 'Check the path.'}"


def fault_of_class(option: str, name: str, model_class: Any, task: str | None) -> str | None:
    """Return a sentence on a model that an auto class has no class for, with the tasks that fit; None if it has one.

    Args:
        option: the option that names the model.
        task: the task that needs the auto class, if any.
    """
    try:
        kind = PretrainedConfig.get_config_dict(name)[0]["model_type"]
    except Exception:  # of many types, as the config may be anything
        return None
    tables = {each.name: getattr(modeling_auto, each.mapping) for each in AUTO_CLASSES}
    if kind in tables.get(model_class.__name__, [kind]):
        return None
    fits = [each for each in TASKS if kind in tables.get(task_class(each).model_class.__name__, ())]
    needs = f"`{option}` {name!r} is of type {kind!r}, for which Transformers has no {model_class.__name__}"
    if task is None:
        return f"{needs}. Give a model of another type."
    remedy = f"Tasks for models of this type are {', '.join(fits)}." if fits else "Give a model of another type."
    return f"{needs}, the class that the task {task!r} trains. {remedy}"


def _is_of_absence(error: OSError) -> bool:
    """Return whether Transformers raised an error because the hub has no such model, or cannot be reached."""
    cause = error.__cause__
    return isinstance(cause, RepositoryNotFoundError | LocalEntryNotFoundError) and not isinstance(
        cause, GatedRepoError
    )
