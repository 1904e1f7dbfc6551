"""Load the rows and the model that a command line names, from files, folders or the hub."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from transformers.utils import logging

from ..errors import DataError, SettingsError
from .parser import TrainArguments

TASKS = {
    "text-classification": AutoModelForSequenceClassification,
    "causal-lm": AutoModelForCausalLM,
}

READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Loaded:
    """The model, tokenizer and rows that a command line names."""

    model: Any
    tokenizer: Any
    train: Dataset
    val: Dataset | None


def load(named: TrainArguments, seed: int) -> Loaded:
    """Load the rows and the model. The seed decides the weights of a new head, so that runs can be repeated.

    Raises:
        DataError: if the rows cannot be read.
        SettingsError: if the task is unknown, or the model cannot be loaded.
    """
    if named.task not in TASKS:
        raise SettingsError([f"`task` must be one of {', '.join(map(repr, TASKS))}, but is {named.task!r} instead."])
    train, val = load_rows(named)
    set_seed(seed)
    model, tokenizer = load_model(named.task, named.model, _classes(named, train))
    return Loaded(model, tokenizer, train, val)


def load_factory(named: TrainArguments) -> tuple[Callable[[], Any], Loaded]:
    """Return a function that loads a new model at each call, and the tokenizer and rows.

    The function can be pickled. `model` of the returned `Loaded` is None.

    Raises:
        DataError, SettingsError: as in `load`.
    """
    loaded = load(named, seed=0)
    return partial(_new_model, named.task, named.model, _classes(named, loaded.train)), replace(loaded, model=None)


def _new_model(*named: Any) -> Any:
    with _without_reports():
        return load_model(*named)[0]


@contextmanager
def _without_reports() -> Iterator[None]:
    """Silence what Transformers prints when it loads weights. It was shown when the first model was loaded."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


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


def load_model(task: str, name: str, classes: Sequence[str] = ()) -> tuple[Any, Any]:
    """Return a model with the head for a task, and its tokenizer.

    Args:
        name: a folder, or a name on the hub.
        classes: for classification, the names of the classes in the order of their numbers.

    Raises:
        SettingsError: if the model or its tokenizer cannot be loaded.
    """
    heads: dict[str, Any] = {}
    if classes:
        heads = {"id2label": dict(enumerate(classes)), "label2id": {name: n for n, name in enumerate(classes)}}
        heads["ignore_mismatched_sizes"] = True  # new head for other classes; Transformers reports it
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = TASKS[task].from_pretrained(name, **heads)
    except (OSError, ValueError, RuntimeError) as error:
        raise SettingsError(
            [f"`model` {name!r} cannot be loaded: {error} Give a folder that `save_pretrained` wrote, or a hub model."]
        ) from error
    if tokenizer.pad_token_id is None:  # models made for generation often have none; padding is masked anyway
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is not None:  # classifiers use the last token that is not padding
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer
