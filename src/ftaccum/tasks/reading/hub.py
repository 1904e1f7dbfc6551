"""Rows of data sets on the hub."""

from pathlib import Path

import datasets
from datasets import Dataset, IterableDataset

from ...errors import DataError
from .data_file import KINDS
from .sources import Source, did_you_mean

_FORMS = f"a {', '.join(KINDS)} file, a folder, or a data set on the hub as name[:config][@split]"
_LONGEST = 400  # characters of a reason


def read_hub(source: Source, *, streaming: bool) -> Dataset | IterableDataset:
    """Return the rows of a data set on the hub, or in the local cache of the hub.

    Raises:
        DataError: if it cannot be read, with the reader's reason.
    """
    try:
        rows = datasets.load_dataset(source.name, source.config, split=source.split, streaming=streaming)
    except Exception as error:
        raise DataError(
            f"`{source.argument}` {source.name!r} is no file or folder here, and cannot be read from the hub: "
            f"{_reason(error)}. {_remedy(source, error)}"
        ) from error
    if not streaming and not len(rows):
        raise DataError(
            f"`{source.argument}` {source.name!r} has no rows in its split {source.split!r}. Choose another."
        )
    return rows


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines) or type(error).__name__
    return (text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …").rstrip(".")


def _remedy(source: Source, error: Exception) -> str:
    words = str(error).lower()
    if near := did_you_mean(Path(source.name)):
        return near
    if "config name is missing" in words or "builderconfig" in words:
        return f"Give the configuration as {source.name}:CONFIG."
    if "split" in words:
        return f"Give the split as {source.name}@SPLIT."
    if isinstance(error, ConnectionError) or "offline" in words or "reach" in words:
        return f"Check the network, and that HF_HUB_OFFLINE is not set; or give {_FORMS}."
    return f"Give {_FORMS}."
