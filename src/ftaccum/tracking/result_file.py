"""A result as JSON: the file `result.json`, and values with null in place of non-finite numbers."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import DataError
from ..runtime.atomic_files import atomic_write
from .ledger import nan_null, null_non_finite

T = TypeVar("T")

_NUMBERS = ("final_loss", "initial_loss", "training_time", "samples_per_second")


def write_values(values: Mapping[str, Any], path: str | Path) -> None:
    """Write values as JSON. An existing file is replaced only when the new one is complete."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(null_non_finite(dict(values)), indent=2, allow_nan=False) + "\n")


def read_result(path: Path, names: Collection[str], build: Callable[..., T]) -> T:
    """Return the result in a file, or in the file `result.json` of a folder.

    Args:
        path: the file or the folder.
        names: the names of a result's values. Others, which only a newer version knows, are left out.
        build: makes a result from its values by name.

    Raises:
        DataError: if the file exists but is not a result.
    """
    file = path / "result.json" if path.is_dir() else path
    try:
        read = json.loads(file.read_text())
        known = {name: value for name, value in read.items() if name in names}
        for name in _NUMBERS:
            known[name] = nan_null(known[name])
        for name in (n for n in names if n.endswith("_history")):
            known[name] = [nan_null(value) for value in known[name]]
        known["metrics"] = [_with_nan(found) for found in known["metrics"]]
        known["audits"] = [_with_nan(audit) for audit in known.get("audits", [])]
        for name in ("initial_metrics", "noise_scale"):
            if numbers := known.get(name):
                known[name] = _with_nan(numbers)
        return build(**known)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # not JSON, or other names and values
        raise DataError(
            f"{str(file)!r} is not a complete result of `test_fine_tuning` ({type(error).__name__}: {error}). Give an "
            "output folder, or a file that `Result.save` wrote."
        ) from error


def _with_nan(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: nan_null(value) for name, value in numbers.items()}
