"""The options of `ftaccum report`, and the runs that it reports on. This module does not load torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from ..errors import DataError, SettingsError, refuse
from ..fields import Text, one_of, setting
from ..insight.curves import RunCurves, axes_of
from ..tracking.result import Result
from ..tracking.run_curves import curves_of
from .run_folder import check_run_folder

_report = partial(setting, group="report")


@dataclass
class ReportArguments:
    """The options of `ftaccum report`."""

    output: Text | None = _report(
        None, "file to write; none: report.html in the run's folder, or here if there are several runs"
    )
    axis: Annotated[str | None, one_of("rows", "updates").or_none()] = _report(
        None, "horizontal axis of the curves when the page opens: rows or updates; none: rows"
    )


def read_runs(sources: Sequence[str]) -> list[RunCurves]:
    """Return the curves of runs that are finished, interrupted or still running.

    Args:
        sources: the output folders of the runs.

    Raises:
        SettingsError: for all folders that are not those of runs, or whose runs have not completed an update yet.
    """
    names, faults, runs = _short_names(sources), [], []
    for source, name in zip(sources, names, strict=True):
        path = Path(source).expanduser()
        try:
            check_run_folder(path)
            runs.append(curves_of(Result.load(path), name, path))
        except (DataError, SettingsError, OSError) as error:
            faults.append(str(error))
    refuse(faults)
    return runs


def check_axis(axis: str | None, runs: Sequence[RunCurves]) -> None:
    """Raise SettingsError if a run does not know the rows of its updates, but should be drawn over rows."""
    if axis == "rows" and "rows" not in axes_of(runs):
        lacking = ", ".join(repr(run.name) for run in runs if not len(run.rows))
        raise SettingsError(
            [f"`--axis` is 'rows', but there is no ledger of {lacking}, which has the rows. Use `--axis updates`."]
        )


def _short_names(sources: Sequence[str]) -> list[str]:
    """Return the last parts of paths, as many as make them different."""
    paths = [Path(source).expanduser().absolute() for source in sources]
    for n_parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-n_parts:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return [f"{name} ({names[:n].count(name) + 1})" if name in names[:n] else name for n, name in enumerate(names)]
