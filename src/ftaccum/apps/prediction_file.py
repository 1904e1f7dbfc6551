"""The file of `ftaccum predict`: the rows, with the columns that were predicted."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..errors import SettingsError
from ..runtime.atomic_files import atomic_write
from .options import check_output_file

_WRITERS: dict[str, Callable[[Dataset, str], Any]] = {
    ".jsonl": lambda rows, path: rows.to_json(path, force_ascii=False),
    ".csv": lambda rows, path: rows.to_csv(path),
    ".parquet": lambda rows, path: rows.to_parquet(path),
}


def check_output(output: str) -> None:
    """Raise SettingsError if predictions cannot be written to a file of this name."""
    if Path(output).suffix not in _WRITERS:
        raise SettingsError([f"`--output` must end in {', '.join(_WRITERS)}, but is {output!r} instead."])
    check_output_file("output", output)


def write_predictions(output: str, rows: Dataset, columns: Mapping[str, list[Any]]) -> None:
    """Write rows with the columns that were predicted. These replace columns of the same names.

    Lists become JSON text in a CSV file.
    """
    path = Path(output).expanduser()
    rows = rows.remove_columns([name for name in columns if name in rows.column_names])
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    with atomic_write(path) as partial:
        _WRITERS[path.suffix](rows, str(partial))
