"""The rows that the options name, with the columns of a task."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
from datasets import Dataset

from ..data.text_columns import check_column
from ..errors import DataError
from ..runtime.log import logger
from .arguments import TrainArguments
from .columns import choose_columns, describe_columns
from .task import Task

READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


def load_rows(
    named: TrainArguments, task: Task, text_columns: Sequence[str] | None = None
) -> tuple[Dataset, Dataset | None]:
    """Return the training and validation rows, with the columns named by their roles. Log which columns are read.

    Args:
        text_columns: the setting; if it is given, the rows must have these columns.

    Raises:
        DataError: if the rows cannot be read, or lack a column.
    """
    train = read_rows(named.train_data)
    if named.max_train_rows is not None:
        train = train.select(range(min(named.max_train_rows, len(train))))
    val = read_rows(named.val_data, split="validation") if named.val_data else None
    chosen = choose_columns(train.column_names, task.roles, task.given, "train_data")
    if not task.reads_text:
        logger.info(describe_columns(chosen, train.column_names))
    for rows, argument in ((train, "train_data"), (val, "val_data")):
        for column in text_columns or () if rows is not None else ():
            check_column(rows, argument, column)
    if val is None:
        return _by_role(train, chosen), None
    return _by_role(train, chosen), _by_role(val, choose_columns(val.column_names, task.roles, chosen, "val_data"))


def read_rows(source: str, *, split: str = "train") -> Dataset:
    """Read a CSV, TSV, JSON, JSON-lines, Parquet or text file, a folder that `save_to_disk` wrote, or a hub data set.

    Args:
        source: a path, or a hub name, followed by `:config` if the data set has several configurations.
        split: the split to read from a hub data set or a saved DatasetDict.

    Raises:
        DataError: if the rows cannot be read.
    """
    path = Path(source)
    try:
        if path.is_dir() and (path / "dataset_info.json").exists() | (path / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(source)
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        if path.suffix in READERS and path.exists():
            options = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
            return datasets.load_dataset(READERS[path.suffix], data_files=source, split="train", **options)
        if path.suffix in READERS:
            raise FileNotFoundError("there is no such file")
        name, _, config = source.partition(":")
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:
        raise DataError(
            f"Rows {source!r} cannot be read: {error}. Give a {', '.join(READERS)} file, a folder that `save_to_disk` "
            "wrote, or the name of a data set on the hub."
        ) from error


def _by_role(rows: Dataset, chosen: Mapping[str, str]) -> Dataset:
    """Name columns by their roles. Drop other columns with such a name; `labels` counts as `label`."""
    changed = {column: role for role, column in chosen.items() if column != role}
    taken = set(changed.values()) | ({"labels"} if "label" in chosen else set())
    dropped = [name for name in rows.column_names if name in taken and name not in chosen.values()]
    return rows.remove_columns(dropped).rename_columns(changed)
