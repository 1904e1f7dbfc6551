"""Rows from files, folders and the hub: what `train_data` and `val_data` name on a command line."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from ...errors import DataError
from .file_rows import read_files
from .folders import read_images, read_saved
from .hub import read_hub
from .mixing import check_weights, first_of_each, join
from .options import ReadingOptions, parse_options
from .sources import Source, find_source


def read_rows(
    source: str | Sequence[str],
    options: ReadingOptions | None = None,
    *,
    argument: str = "train_data",
    split: str = "train",
    seed: int = 42,
    text_columns: Sequence[str] = (),
    limit: int | None = None,
) -> Dataset | IterableDataset:
    """Read rows from one or several sources.

    A source is a CSV, TSV, JSON, JSON-lines, Parquet or text file, also compressed; a folder or a pattern of such files
    of one kind; a folder that `save_to_disk` wrote; a folder with images in a sub-folder for each class; or a data set
    on the hub, as `name[:config]`. `@split` after a source chooses its split.

    Args:
        source: a source, several separated by commas, or a list of them.
        options: how to read; None for the defaults.
        argument: the argument that named the source, for messages. Weights and streaming are only for `train_data`.
        split: the split to read from a source that has several.
        seed: decides how sources with weights are mixed.
        text_columns: CSV columns to read as text, even if all their cells are numbers.
        limit: the most rows to return; None for all. Of sources that follow each other, and of each class of a folder
            of images, return the first rows in proportion. A stream does not know its number of rows.

    Returns:
        the rows, which have `column_names`; an `IterableDataset` if `options.streaming`.

    Raises:
        SettingsError: if an option is invalid, or there is not one weight for each source.
        DataError: if the rows cannot be read. It names the argument, the file, and the line or row if there is one.
    """
    parsed = parse_options(options or ReadingOptions())
    is_train = argument == "train_data"
    if not is_train:
        parsed = ReadingOptions(delimiter=parsed.delimiter, encoding=parsed.encoding)
    names = _names(source)
    if not names:
        raise DataError(f"`{argument}` is empty. Give the path of a file or a folder, or a name on the hub.")
    weights: Any = parsed.train_data_weights
    check_weights(weights, len(names), argument)
    found = [find_source(name, split, argument) for name in names]  # all of them before the first is read
    read = [(name, _read(each, parsed, text_columns)) for name, each in zip(names, found, strict=True)]
    rows = join(read, weights, seed, argument)
    if limit is None or isinstance(rows, IterableDataset):
        return rows if limit is None else rows.take(limit)
    are_mixed = weights is not None and len(read) > 1
    sizes = [n for each, (_, part) in zip(found, read, strict=True) for n in _sizes(each, part)]
    return first_of_each(rows, [len(rows)] if are_mixed else sizes, limit)


def columns_of(rows: Dataset | IterableDataset) -> list[str]:
    """Return the names of the columns; for a stream that does not declare them, those of its first row."""
    if rows.column_names is not None:
        return list(rows.column_names)
    return list(next(iter(rows), {}))


def _names(source: str | Sequence[str]) -> list[str]:
    """Return the sources in a string, which commas separate, unless a file has this name."""
    if not isinstance(source, str):
        return [str(each) for each in source]
    whole = source.strip()
    if "," not in whole or Path(whole).expanduser().exists():
        return [whole] if whole else []
    return [name for part in whole.split(",") if (name := part.strip())]


def _sizes(source: Source, rows: Dataset) -> list[int]:
    """Return the number of rows of each class of a folder of images, which follow each other; else of all rows."""
    if source.kind != "images" or "label" not in rows.column_names:
        return [len(rows)]
    return [len(list(same)) for _, same in itertools.groupby(rows.select_columns("label")["label"])]


def _read(source: Source, options: ReadingOptions, text_columns: Sequence[str]) -> Any:
    if source.kind == "hub":
        return read_hub(source, streaming=options.streaming)
    if source.kind == "files":
        return read_files(source.files, options, source.split, text_columns)
    rows = read_saved(source) if source.kind == "saved" else read_images(source)
    return rows.to_iterable_dataset() if options.streaming else rows
