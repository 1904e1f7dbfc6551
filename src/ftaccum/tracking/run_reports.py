"""Reports and plots of runs."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SettingsError
from ..insight.curves import Axis, RunCurves
from ..insight.figures import figure_of
from ..insight.run_report import report_page
from ..runtime.atomic_files import atomic_write
from .recorded import Recorded
from .run_curves import curves_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .result import Result


def report_result(result: "Result", path: str | Path | None, recorded: Recorded | None) -> Path:
    """Write the report of a result, and return its path. On several processes, only the main one writes.

    Args:
        result: the result.
        path: the file to write; None for `report.html` in the result's folder.
        recorded: the ledger and the record in memory of a run without a folder.

    Raises:
        SettingsError: if `path` is None and the result has no folder, or if matplotlib is missing.
        OSError: if the file cannot be written.
    """
    if path is None and result.output_dir is None:
        raise SettingsError(
            ["`path` is None, but the run had no `output_dir` to write `report.html` to. Give the path of a file."]
        )
    file = Path(path).expanduser() if path is not None else Path(str(result.output_dir), "report.html")
    if os.environ.get("RANK", "0") == "0":
        write_report([curves_of(result, recorded=recorded)], file)
    return file


def write_report(runs: Sequence[RunCurves], file: Path, axis: Axis | None = None) -> None:
    """Write one page on some runs.

    Args:
        runs: the runs, with different names.
        file: the file to write.
        axis: what the page first draws the curves over; None for rows if all runs know them, else updates.

    Raises:
        SettingsError: if matplotlib is missing.
        OSError: if the file cannot be written.
    """
    with _matplotlib_for("A report"):
        text = report_page(runs, axis)
    if file.exists() and not file.is_file():  # such as /dev/stdout
        file.write_text(text, encoding="utf-8")
        return
    with atomic_write(file) as partial:
        partial.write_text(text, encoding="utf-8")


def plot_result(result: "Result", recorded: Recorded | None) -> "Figure":
    """Return a figure of a result, with a panel for each quantity that is known.

    Raises:
        SettingsError: if matplotlib is missing.
    """
    with _matplotlib_for("`plot`"):
        return figure_of(curves_of(result, recorded=recorded))


@contextmanager
def _matplotlib_for(user: str) -> Iterator[None]:
    """Raise SettingsError if matplotlib is missing."""
    try:
        yield
    except ImportError as error:
        raise SettingsError(
            [f"{user} needs matplotlib, which cannot be imported: {error}. Run `pip install ftaccum[plots]`."]
        ) from error
