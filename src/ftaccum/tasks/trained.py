"""Load a trained model with the task that it was trained for, and rows to evaluate it on."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.text_columns import check_column
from ..errors import SettingsError
from ..runtime.log import logger
from ..runtime.run_dir import RunDir
from ..settings.recipe import Recipe
from ..tracking.run_record import RunRecord
from ..tracking.saved_model import ADAPTER
from .adapter_folder import load_with_base
from .arguments import TrainArguments, TrainedArguments
from .columns import choose_columns, describe_columns
from .load import make_task
from .model_names import missing_folder
from .model_source import ModelSource
from .reading.options import ReadingOptions
from .reading.rows import read_rows
from .rows import by_role
from .task import EncodingOptions, Task
from .task_of_model import find_task


@dataclass(frozen=True)
class Trained:
    """A trained model and rows to evaluate it on.

    Attributes:
        task: the task that it was trained for.
        model: the model.
        processor: its tokenizer or image processor.
        raw: the rows as they are in the data, with all columns.
        rows: the rows with the columns of the task, named by their roles.
        encoded: the rows as the model takes them, or raw text.
        settings: the settings that decide how text is read: those given, or else those of the run; and those of the run
            that its validation loss depends on.
    """

    task: Task
    model: Any
    processor: Any
    raw: Dataset
    rows: Dataset
    encoded: Dataset
    settings: dict[str, Any]


def load_trained(run: str, given: TrainedArguments, settings: Mapping[str, Any], *, needs_targets: bool) -> Trained:
    """Load a trained model, and rows to evaluate it on.

    Args:
        run: the output folder of a run, or a folder or hub name of a model.
        given: the rows, and the task if it is not that of the run, or of the head of the model.
        settings: settings by name. Those that are None are taken from the run.
        needs_targets: whether the rows must have the columns to compare with.

    Raises:
        SettingsError: if there is no such run, its model cannot be loaded, or its task cannot predict.
        DataError: if the rows cannot be read, or do not fit the task.
    """
    record, folder = _find(run)
    named = _named(run, given, record, folder)
    task = make_task(named)
    if not needs_targets and type(task).predicted_columns is Task.predicted_columns:
        raise SettingsError(
            [f"`ftaccum predict` has no predictions for the task {named.task!r}. `ftaccum eval` measures its loss."]
        )
    settings = _settings(settings, record) | _loss_settings(record)
    texts = settings["text_columns"] or ()
    options = ReadingOptions(delimiter=given.delimiter, encoding=given.encoding)
    raw = read_rows(given.data, options, argument="data", split="test", text_columns=texts, limit=given.max_rows)
    assert isinstance(raw, Dataset), "only training data are streamed"
    roles = {role: kind for role, kind in task.roles.items() if needs_targets or role not in task.targets}
    chosen = choose_columns(raw.column_names, roles, {r: c for r, c in task.given.items() if r in roles}, "data")
    for column in texts:
        check_column(raw, "data", column)
    names = ("text",) if len(texts) == 1 else ("first text", "second text")
    if read := dict(zip(names, texts, strict=False)) | chosen:
        logger.info(describe_columns(read, raw.column_names))
    rows = by_role(raw, chosen)
    if not needs_targets:
        rows = rows.remove_columns([n for n in {"label", "labels", *task.targets} if n in rows.column_names])
    source = ModelSource(named, task.model_class, task.processor_class, {}, named.dtype)
    if (Path(named.model) / ADAPTER).is_file():
        model, processor = load_with_base(Path(named.model)), source.load_processor()
    else:
        model, processor = source.load()
    task.read_config(model.config)
    encoding = EncodingOptions(
        settings["text_columns"], settings["max_length"], add_eos_token=settings["add_eos_token"]
    )
    if needs_targets:
        encoded = task.encode(rows, "data", processor, model, encoding)
    else:
        encoded = task.encode_inputs(rows, processor, model, encoding)
    return Trained(task, model, processor, raw, rows, encoded, settings)


def _find(run: str) -> tuple[RunRecord | None, str]:
    """Return the record of a run, if there is one, and the folder or name of its model."""
    path = Path(run).expanduser()
    run_dir = RunDir(path)
    if not path.is_dir():
        if len(path.parts) > 2 or run.startswith((".", "/", "~")):
            raise SettingsError([f"{run!r}: {missing_folder(path)} Give the output folder of a run, or a model."])
        return None, run  # a name on the hub
    record = RunRecord.read(run_dir.record)
    for folder in (run_dir.model, run_dir.adapter, path):
        if (folder / "config.json").is_file() or (folder / ADAPTER).is_file():
            return record, str(folder)
    is_resumable = record is not None and not record.finished and any(run_dir.checkpoints.glob("update-*"))
    finish = ", or finish this one with `--resume auto`" if is_resumable else ""
    raise SettingsError(
        [f"{run!r} has no trained model: there is no `model/` in it. Give the output folder of a finished run{finish}."]
    )


def _named(run: str, given: TrainedArguments, record: RunRecord | None, folder: str) -> TrainArguments:
    """Return the options of the run, with those that are given in their place."""
    known = {f.name for f in fields(TrainArguments)} - {
        "tokenizer",
        "revision",
        "add_tokens",
        "freeze",
        "max_train_rows",
        "max_val_rows",
        "chat_template",  # the tokenizer has it
    }
    options = {} if record is None else record.sources or record.loaded_with
    sources = {name: value for name, value in options.items() if name in known}
    task = given.task or sources.get("task") or find_task(run, folder)
    named = TrainArguments(**{**sources, "model": folder, "train_data": given.data, "val_data": None, "task": task})
    if given.columns is not None:
        named = replace(named, columns=given.columns, label_column=None)
    return named if given.label_column is None else replace(named, label_column=given.label_column)


def _loss_settings(record: RunRecord | None) -> dict[str, Any]:
    """Return the settings that the validation loss of a run depends on."""
    if record is None:
        return {}
    balance = record.recipe.get("router_balance")
    return {"effective_batch_size": record.effective_batch_size} | ({"router_balance": balance} if balance else {})


def _settings(given: Mapping[str, Any], record: RunRecord | None) -> dict[str, Any]:
    """Return settings, with those of the run in place of those that are None."""
    of_run = (
        {}
        if record is None
        else record.recipe | {"text_columns": record.text_columns or record.recipe.get("text_columns")}
    )
    names = {f.name for f in fields(Recipe)}
    return {n: of_run.get(n) if value is None and n in names else value for n, value in given.items()}
