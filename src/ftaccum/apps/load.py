"""Load the rows and the model that a command line names, from files, folders or the hub."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from transformers.utils import logging as transformers_logging

from ..arguments import parse_settings
from ..data.text_columns import check_column
from ..errors import DataError, SettingsError
from ..runtime.accelerator import is_first_process
from ..runtime.library_output import library_bars, load_report_withheld
from ..runtime.log import logger, run_logging
from ..settings import Runtime
from .parser import TrainArguments

TASKS = {
    "text-classification": AutoModelForSequenceClassification,
    "causal-lm": AutoModelForCausalLM,
}

_LARGEST_HEAD = 0.1  # share of a model that can be new without a warning
_NAMED = 6  # new weights to name
READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Loaded:
    """The model, tokenizer and rows that a command line names."""

    model: Any
    tokenizer: Any
    train: Dataset
    val: Dataset | None


def load(named: TrainArguments, seed: int, text_columns: Any = None) -> Loaded:
    """Load the rows and then the model.

    Args:
        named: the names of the model and of the rows.
        seed: decides the weights of a new head, so that runs can be repeated.
        text_columns: the setting; if it is given, the rows must have these columns.

    Raises:
        DataError: if the rows cannot be read.
        SettingsError: if the task is unknown, or the model cannot be loaded.
    """
    if named.task not in TASKS:
        raise SettingsError([f"`task` must be one of {', '.join(map(repr, TASKS))}, but is {named.task!r} instead."])
    train, val = load_rows(named)
    for column in parse_settings({"text_columns": text_columns})[0].text_columns or ():
        check_column(train, "train_data", column)
        if val is not None:
            check_column(val, "val_data", column)
    set_seed(seed)
    model, tokenizer = load_model(named.task, named.model, _classes(named, train))
    return Loaded(model, tokenizer, train, val)


def load_factory(named: TrainArguments, text_columns: Any = None) -> tuple[Callable[[], Any], Loaded]:
    """Return a function that loads a new model at each call, and the tokenizer and rows.

    The function can be pickled. `model` of the returned `Loaded` is None.

    Raises:
        DataError, SettingsError: as in `load`.
    """
    loaded = load(named, 0, text_columns)
    return partial(_new_model, named.task, named.model, _classes(named, loaded.train)), replace(loaded, model=None)


def _new_model(*named: Any) -> Any:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # warnings were shown when the first model was loaded
    try:
        with run_logging(enabled=False), library_bars(shown=False):
            return load_model(*named)[0]
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def loading(*, verbosity: str, progress: bool) -> Iterator[None]:
    """Show what is loaded on the first process only, as much as these settings of a run allow."""
    is_first, shows_bars = is_first_process(), Runtime(verbosity=verbosity, progress=progress).shows_bars
    with run_logging(enabled=is_first, verbosity=verbosity), library_bars(shown=is_first and shows_bars):
        yield


def load_rows(named: TrainArguments) -> tuple[Dataset, Dataset | None]:
    """Return the training and validation rows. For classification, rename the column of classes to `label`."""
    columns = {named.label_column: "label"} if named.task == "text-classification" else {}
    train = read_rows(named.train_data, columns=columns)
    if named.max_train_rows is not None:
        train = train.select(range(min(named.max_train_rows, len(train))))
    val = read_rows(named.val_data, split="validation", columns=columns) if named.val_data else None
    return train, val


def _classes(named: TrainArguments, train: Dataset) -> list[str]:
    return class_names(train) if named.task == "text-classification" else []


def read_rows(source: str, *, split: str = "train", columns: dict[str, str] | None = None) -> Dataset:
    """Read a CSV, TSV, JSON, JSON-lines, Parquet or text file, a folder that `save_to_disk` wrote, or a hub data set.

    Args:
        source: a path, or a hub name, followed by `:config` if the data set has several configurations.
        split: the split to read from a hub data set or a saved DatasetDict.
        columns: new column names, {old: new}.

    Raises:
        DataError: if the rows cannot be read, or lack a column to rename.
    """
    path = Path(source)
    try:
        if path.is_dir() and (path / "dataset_info.json").exists() | (path / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(source)
            rows = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        elif path.suffix in READERS and path.exists():
            options = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
            rows = datasets.load_dataset(READERS[path.suffix], data_files=source, split="train", **options)
        elif path.suffix in READERS:
            raise FileNotFoundError("there is no such file")
        else:
            name, _, config = source.partition(":")
            rows = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:
        raise DataError(
            f"Rows {source!r} cannot be read: {error}. Give a {', '.join(READERS)} file, a folder that `save_to_disk` "
            "wrote, or the name of a data set on the hub."
        ) from error
    missing = [old for old in columns or {} if old not in rows.column_names]
    if missing:
        raise DataError(
            f"Rows {source!r} have no column {missing[0]!r}. Give the name of one of their columns instead: "
            f"{rows.column_names}."
        )
    return _renamed(rows, columns or {})


def _renamed(rows: Dataset, columns: Mapping[str, str]) -> Dataset:
    """Rename columns. Drop other columns that already have a new name; `labels` counts as `label`."""
    changed = {old: new for old, new in columns.items() if old != new}
    synonyms = {"labels"} if "label" in columns.values() else set()
    dropped = (set(changed.values()) | synonyms) - changed.keys()
    return rows.remove_columns([name for name in rows.column_names if name in dropped]).rename_columns(changed)


def class_names(rows: Dataset, label: str = "label") -> list[str]:
    """Return the classes of a label column, in the order of their numbers.

    Raises:
        DataError: if the column is missing or has gaps, or if its labels are neither names nor integers from 0 on.
    """
    if label not in rows.column_names:
        raise DataError(
            f"The rows have no label column {label!r}, only {rows.column_names}. Choose one with `--label_column`."
        )
    feature = rows.features[label]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    found = rows.unique(label)
    if None in found:
        raise DataError(f"Some rows have no label in {label!r}. Drop these rows, or give them a label.")
    found.sort()
    if all(isinstance(value, str) for value in found):
        return found
    if all(isinstance(value, int) and value >= 0 for value in found):
        return [str(number) for number in range(found[-1] + 1)]
    raise DataError(
        f"Labels must be names or whole numbers from 0 on, but {label!r} has {found[:5]}. Convert them first."
    )


@dataclass(frozen=True)
class NewWeights:
    """The weights of a model that its checkpoint does not have, or has in another shape. They are random.

    Attributes:
        names: the names of the weights.
        share: their share of all weights.
    """

    names: list[str]
    share: float

    @property
    def level(self) -> int:
        """The level to log them at: a new head is as planned, but a new body means that the checkpoint does not fit."""
        return logging.WARNING if self.share > _LARGEST_HEAD else logging.INFO

    def __str__(self) -> str:
        more = f" and {len(self.names) - _NAMED} more" if len(self.names) > _NAMED else ""
        fits = " Does the checkpoint belong to this kind of model?" if self.level == logging.WARNING else ""
        return (
            f"New weights, which the checkpoint does not have: {', '.join(self.names[:_NAMED])}{more} "
            f"({self.share:.1%} of the model).{fits}"
        )


def _new_weights(model: Any, report: Mapping[str, Any]) -> NewWeights | None:
    """Return the weights that Transformers has made anew, from its report on loading; None if there are none."""
    names = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    sizes = {name: weight.numel() for name, weight in model.state_dict().items()}
    share = sum(sizes.get(name, 0) for name in names) / max(1, sum(sizes.values()))
    return NewWeights(names, share) if names else None


def load_model(task: str, name: str, classes: Sequence[str] = ()) -> tuple[Any, Any]:
    """Return a model with the head for a task, and its tokenizer. Log which weights are new.

    Args:
        name: a folder, or a name on the hub.
        classes: for classification, the names of the classes in the order of their numbers.

    Raises:
        SettingsError: if the model or its tokenizer cannot be loaded.
    """
    heads: dict[str, Any] = {}
    if classes:
        heads = {"id2label": dict(enumerate(classes)), "label2id": {name: n for n, name in enumerate(classes)}}
        heads["ignore_mismatched_sizes"] = True  # new head for other classes, which is logged
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        with load_report_withheld():
            model, report = TASKS[task].from_pretrained(name, **heads, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise SettingsError(
            [f"`model` {name!r} cannot be loaded: {error} Give a folder that `save_pretrained` wrote, or a hub model."]
        ) from error
    if new := _new_weights(model, report):
        logger.log(new.level, new)
    if tokenizer.pad_token_id is None:  # models made for generation often have none; padding is masked anyway
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is not None:  # classifiers use the last token that is not padding
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer
