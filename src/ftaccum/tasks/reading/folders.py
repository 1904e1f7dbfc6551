"""Rows of folders: those that `save_to_disk` wrote, and images with a folder for each class."""

import json
from collections.abc import Iterable
from pathlib import Path

import datasets
from datasets import Dataset

from ...errors import DataError, first_line
from .sources import IMAGES, Source


def read_saved(source: Source) -> Dataset:
    """Return the rows of a folder that `save_to_disk` wrote.

    Raises:
        DataError: if it cannot be read, has no such split, or has no rows.
    """
    folder = Path(source.name)
    try:
        if (folder / "dataset_dict.json").exists():
            check_split(source, json.loads((folder / "dataset_dict.json").read_text())["splits"])
            folder /= source.split
        has_rows = bool(json.loads((folder / "state.json").read_text())["_data_files"])  # else it cannot be loaded
        rows = datasets.load_from_disk(str(folder)) if has_rows else []
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(source, error, "Write it again with `save_to_disk`.") from error
    if not len(rows):
        raise DataError(f"`{source.argument}` {source.name!r} has no rows. Give data with rows.")
    return rows


def read_images(source: Source) -> Dataset:
    """Return images with the columns `image` and `label`, a class for each sub-folder.

    A metadata file, as `datasets` reads it, gives other columns instead of the label.

    Raises:
        DataError: if a file is empty, or the folder cannot be read.
    """
    paths = [path for path in sorted(Path(source.name).rglob("*")) if path.suffix.lower() in IMAGES]
    for path in paths:
        if not path.stat().st_size:
            raise DataError(f"`{source.argument}` {str(path)!r}: the image is empty. Replace or delete it.")
    try:
        found = datasets.load_dataset("imagefolder", data_dir=source.name)
    except Exception as error:
        raise _unreadable(source, error, "Put the images of each class in a folder with its name.") from error
    if source.has_split or len(found) > 1:
        check_split(source, found)
        rows = found[source.split]
    else:  # all images
        (rows,) = found.values()
    if "label" not in rows.column_names and rows.column_names == ["image"]:
        raise DataError(
            f"`{source.argument}` {source.name!r} has images, but no classes. Put the images of each class "
            "in a sub-folder with its name, two classes or more."
        )
    return rows


def check_split(source: Source, splits: Iterable[str]) -> None:
    """Raise DataError if the split to read is not among these."""
    if source.split not in splits:
        raise DataError(
            f"`{source.argument}` {source.name!r} has no split {source.split!r}, but {', '.join(map(repr, splits))}. "
            f"Choose one as {source.name}@{next(iter(splits), 'train')}."
        )


def _unreadable(source: Source, error: Exception, remedy: str) -> DataError:
    return DataError(f"`{source.argument}` {source.name!r} cannot be read: {first_line(error)}. {remedy}")
