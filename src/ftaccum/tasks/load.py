"""Load the rows, the model and the metrics of a task."""

import difflib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from ..arguments import find_faults, parse_settings, read_settings
from ..errors import SettingsError, refuse
from ..runtime.accelerator import is_first_process
from ..runtime.library_output import library_bars
from ..runtime.log import run_logging
from ..settings.runtime import Runtime
from .arguments import (
    LOADING_SETTINGS,
    TASKS,
    TEXT_SETTINGS,
    NamedArguments,
    TrainArguments,
    faults_of_val_data,
)
from .loaded_models import remember_options
from .model_source import ModelSource
from .quantization import faults_of_quantization
from .rows import load_rows
from .task import EncodingOptions, Task
from .task_classes import task_class

_SIMILAR = 0.85  # with less, a name often means another quantity


@dataclass(frozen=True)
class Loaded:
    """The model and rows that a command line names.

    Attributes:
        model: the model.
        tokenizer: the tokenizer or image processor.
        train, val: the rows.
        task: the task.
        new_model: loads a new model at each call; it can be pickled.
        more: further arguments of `test_fine_tuning`, such as `data_collator` and `compute_metrics`.
    """

    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    train: Dataset
    val: Dataset | None
    task: Task = field(repr=False)
    new_model: Callable[[], Any] = field(repr=False)
    more: dict[str, Any] = field(default_factory=dict, repr=False)

    def arguments(self) -> dict[str, Any]:
        """Return all of it as arguments of `test_fine_tuning`."""
        return {"model": self.model} | self._rows()

    def search_arguments(self) -> dict[str, Any]:
        """Return all of it as arguments of `search`, which loads a new model for each trial."""
        return {"model_factory": self.new_model} | self._rows()

    def _rows(self) -> dict[str, Any]:
        rows = {"train_data": self.train, "val_data": self.val, "tokenizer": self.tokenizer}
        return rows | self.more


def make_task(named: NamedArguments) -> Task:
    """Return the task that the options name.

    Raises:
        SettingsError: if there is no such task, or an option does not fit it.
    """
    if named.task not in TASKS:
        near = difflib.get_close_matches(named.task.replace("_", "-"), TASKS, 1, _SIMILAR)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        faults = [f"`task` must be one of {', '.join(map(repr, TASKS))}, but is {named.task!r} instead.{meant}"]
        raise SettingsError(faults)
    return task_class(named.task)(named)


def load_task(task: str, model: str, train_data: str, val_data: str | None = None, **options: Any) -> Loaded:
    """Load the model, the rows and the metrics of a task, as `ftaccum train` does.

    Args:
        task: the kind of task, such as "text-classification"; docs/tasks.md lists them.
        model: folder or hub name of the model.
        train_data, val_data: files, folders or hub names of the rows.
        **options: further options of `ftaccum train` that concern the model and the data, such as `columns`,
            `max_length`, `random_seed` and `validation_split`.

    Returns:
        The parts of a run. `test_fine_tuning(**loaded.arguments())` trains the model.

    Raises:
        DataError: if the rows cannot be read, or do not fit the task.
        SettingsError: if an option is unknown or invalid, or the model cannot be loaded.
    """
    given = {"task": task, "model": model, "train_data": train_data, "val_data": val_data, **options}
    known = {f.name for f in fields(TrainArguments)}
    settings = {name: value for name, value in given.items() if name not in known}
    unknown = [name for name in settings if name not in LOADING_SETTINGS]
    refuse([f"`load_task` has no option {name!r}. {_hint(name, known)}" for name in unknown])
    refuse([_of_objects(name, given[name]) for name in ("model", "train_data", "val_data") if _is_object(given[name])])
    named = read_settings(TrainArguments, given)
    refuse(find_faults(named))
    loaded = load(named, settings)
    # `test_fine_tuning` tokenizes the texts of some tasks.
    text = {name: settings[name] for name in TEXT_SETTINGS if name in settings}
    return replace(loaded, more=loaded.more | text)


def _is_object(value: Any) -> bool:
    return not (value is None or isinstance(value, str | os.PathLike))


def _of_objects(name: str, value: Any) -> str:
    return (
        f"`{name}` must be a string, such as the name of a file, but is a {type(value).__name__} instead. In Python, "
        "`test_fine_tuning` takes models and rows that are loaded."
    )


def _hint(unknown: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(unknown, [*known, *LOADING_SETTINGS], 1, _SIMILAR)
    return f"Did you mean {near[0]!r}?" if near else "Give settings of the run to `test_fine_tuning`."


def load(named: TrainArguments, settings: Mapping[str, Any]) -> Loaded:
    """Load the rows and then the model, and encode the rows.

    Args:
        named: the names of the task, the model and the rows.
        settings: settings of the run. `random_seed` decides the weights of a new head, so that runs can be repeated.
            Metrics are computed if there are validation rows.

    Raises:
        DataError: if the rows cannot be read.
        SettingsError: if the task is unknown, or the model cannot be loaded.
    """
    task = make_task(named)
    bits = {"load_in_4bit": named.load_in_4bit, "load_in_8bit": named.load_in_8bit}
    has_adapters = settings.get("lora") not in (None, False)
    faults = faults_of_quantization(**bits, has_adapters=has_adapters) + faults_of_val_data(named)
    refuse(faults + _faults_of_freeze(named, has_adapters))
    recipe, runtime = parse_settings(settings)
    train, val = load_rows(named, task, recipe.text_columns, recipe.random_seed)
    head = task.head(train)
    task.check(recipe)  # its metrics may depend on the labels
    source = ModelSource(
        named, task.model_class, task.processor_class, head, named.dtype, named.load_in_4bit, named.load_in_8bit
    )
    set_seed(recipe.random_seed)
    model, processor = source.load()
    remember_options(model, named)
    workers = runtime.preprocessing_num_workers or 1
    options = EncodingOptions(recipe.text_columns, recipe.max_length, workers, recipe.add_eos_token)
    rows, train = train, task.encode(train, "train_data", processor, model, options)
    if val is not None:
        val = task.encode(val, "val_data", processor, model, options)
    elif recipe.validation_split:
        train, val = task.hold_out(rows, train, recipe.validation_split, recipe.random_seed)
    more = task.training_arguments(processor, model)
    if val is not None or recipe.validation_split:
        more |= task.evaluation_arguments(processor, model)
    return Loaded(model, processor, train, val, task, partial(_new_model, source, processor, named), more)


def _faults_of_freeze(named: TrainArguments, has_adapters: bool) -> list[str]:
    if not (named.freeze and has_adapters):
        return []
    return [
        f"`freeze` is {list(named.freeze)}, but `lora` freezes all weights besides the adapters and the head. Leave it "
        "out; `target_modules` (`--lora_targets`) chooses the layers that get adapters."
    ]


def _new_model(source: ModelSource, processor: Any, named: TrainArguments) -> Any:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # warnings were shown when the first model was loaded
    try:
        with run_logging(enabled=False), library_bars(shown=False):
            model = source.load_model(processor)
    finally:
        transformers_logging.set_verbosity(verbosity)
    remember_options(model, named)
    return model


@contextmanager
def loading(*, verbosity: str, progress: bool) -> Iterator[None]:
    """Show what is loaded on the first process only, as much as these settings of a run allow."""
    is_first, shows_bars = is_first_process(), Runtime(verbosity=verbosity, progress=progress).shows_bars
    with run_logging(enabled=is_first, verbosity=verbosity), library_bars(shown=is_first and shows_bars):
        yield
