"""The file of `ftaccum predict`: the rows, with the columns that were predicted."""

import base64
import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Image

from ..errors import SettingsError
from ..runtime.atomic_files import atomic_write
from ..runtime.log import logger
from .options import check_output_file


def _write_json(rows: Dataset, path: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{_as_json(row)}\n" for row in _undecoded(rows))


def _write_csv(rows: Dataset, path: str) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows.column_names)
        for row in _undecoded(rows):
            writer.writerow([_as_json(cell) if isinstance(cell, list | dict) else cell for cell in row.values()])


def _undecoded(rows: Dataset) -> Iterator[dict[str, Any]]:
    """Yield rows with images as their paths or bytes."""
    for name, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
    for row in rows:
        yield dict(row)


def _as_json(value: Any) -> str:
    """Return JSON text with all digits of numbers; NaN and infinity, which JSON lacks, are null."""
    return json.dumps(_finite(value), ensure_ascii=False, default=_as_text)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_text(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


_WRITERS: dict[str, Callable[[Dataset, str], Any]] = {
    ".jsonl": _write_json,
    ".csv": _write_csv,
    ".parquet": lambda rows, path: rows.to_parquet(path),
}


def check_output(output: str) -> None:
    """Raise SettingsError if predictions cannot be written to a file of this name."""
    if Path(output).suffix not in _WRITERS:
        raise SettingsError([f"`--output` must end in {', '.join(_WRITERS)}, but is {output!r} instead."])
    check_output_file("output", output)


def write_predictions(output: str, rows: Dataset, columns: Mapping[str, list[Any]]) -> None:
    """Write rows with the columns that were predicted. These replace columns of the same names.

    Lists and objects become JSON text in a CSV file.
    """
    path = Path(output).expanduser()
    if replaced := [name for name in columns if name in rows.column_names]:
        logger.warning(f"Predictions replace the columns {', '.join(replaced)} of the rows. Rename them to keep them.")
    rows = rows.remove_columns(replaced)
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    with atomic_write(path) as partial:
        _WRITERS[path.suffix](rows, str(partial))
