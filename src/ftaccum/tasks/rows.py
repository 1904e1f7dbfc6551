"""The rows that the options name, with the columns of a task."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from datasets import Dataset

from ..data.text_columns import check_column
from ..errors import SettingsError
from ..runtime.log import logger
from .arguments import TrainArguments
from .columns import choose_columns, describe_columns
from .reading.options import ReadingOptions
from .reading.rows import columns_of, read_rows
from .task import Task


def load_rows(
    named: TrainArguments, task: Task, text_columns: Sequence[str] | None, seed: int
) -> tuple[Any, Dataset | None]:
    """Return the training and validation rows, with the columns named by their roles. Log which columns are read.

    Args:
        text_columns: the setting; if it is given, the rows must have these columns.
        seed: decides how sources with weights are mixed.

    Returns:
        The training rows, as a stream with the option `streaming`; and the validation rows, if there are any.

    Raises:
        DataError: if the rows cannot be read, or lack a column.
        SettingsError: if the task cannot read a stream.
    """
    if named.streaming and not task.streams:
        raise SettingsError(
            [
                f"`streaming` is on, but the task {named.task!r} reads all rows before it loads the model. Leave it "
                "out; `max_train_rows` reads fewer rows."
            ]
        )
    options = ReadingOptions(**{f.name: getattr(named, f.name) for f in fields(ReadingOptions)})
    texts = text_columns or ()
    train = read_named(named, "train_data", options, seed=seed, text_columns=texts)
    val = read_named(named, "val_data", options, text_columns=texts) if named.val_data else None
    names = columns_of(train)
    chosen = choose_columns(names, task.roles, task.given, "train_data")
    if not task.reads_text:
        logger.info(describe_columns(chosen, names))
    for rows, argument in ((train, "train_data"), (val, "val_data")):
        for column in texts if isinstance(rows, Dataset) else ():
            check_column(rows, argument, column)
    if val is None:
        return by_role(train, chosen), None
    return by_role(train, chosen), by_role(val, choose_columns(val.column_names, task.roles, chosen, "val_data"))


def read_named(named: Any, argument: str, options: ReadingOptions, **more: Any) -> Any:
    """Return the first rows that an option names, as many as another option allows.

    Args:
        named: options with the fields of `TrainDataArguments` and `ValDataArguments`.
        argument: "train_data" or "val_data".
        options: how to read.
        **more: further arguments of `read_rows`.

    Raises:
        DataError: if the rows cannot be read.
    """
    split, limit = ("train", "max_train_rows") if argument == "train_data" else ("validation", "max_val_rows")
    source, most = getattr(named, argument), getattr(named, limit)
    return read_rows(source, options, argument=argument, split=split, limit=most, **more)


def by_role(rows: Any, chosen: Mapping[str, str]) -> Any:
    """Name columns by their roles. Drop other columns with such a name; `labels` counts as `label`."""
    changed = {column: role for role, column in chosen.items() if column != role}
    taken = set(changed.values()) | ({"labels"} if "label" in chosen else set())
    dropped = [name for name in columns_of(rows) if name in taken and name not in chosen.values()]
    return rows.remove_columns(dropped).rename_columns(changed) if dropped or changed else rows
