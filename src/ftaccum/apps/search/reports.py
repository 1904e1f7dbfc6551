"""Write the reports of a finished study: a table, plots, and one page with both."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from ...errors import OutputWarning, warn_user
from ...insight import page
from ...insight.figures import new_figure
from ...insight.style import as_svg, page_style
from .space import RATE, STEPS
from .study import criterion_of
from .tables import best_trial, format_value, parameter_importances, summarize, trial_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PRUNED, _FINISHED, _BEST = "0.6", "C0", "C3"


def write_reports(study: Study, folder: Path) -> None:
    """Write `trials.csv`, plots as PNG if matplotlib is installed, and a self-contained `report.html`."""
    rows = trial_rows(study)
    with (folder / "trials.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([list(rows[0]), *(row.values() for row in rows)] if rows else [])
    figures: list[str] = []
    for name, plot in PLOTS.items():
        try:
            with page_style():
                if (drawn := plot(study)) is not None:
                    drawn.savefig(folder / f"{name}.png", dpi=215)
                    figures.append(_page_figure(name, drawn))
        except ImportError:  # matplotlib is an extra
            break
        except Exception as error:  # a failed plot must not end a search of hours
            warn_user(f"The plot {name!r} could not be drawn: {error!r}", OutputWarning)
    (folder / "report.html").write_text(_page(study, rows, figures), encoding="utf-8")


def _page(study: Study, rows: list[dict[str, Any]], figures: list[str]) -> str:
    cells = [[format_value(value) for value in row.values()] for row in rows]
    parts = [
        page.preformatted(summarize(study)),
        page.figures(figures)
        if figures
        else page.paragraph("Plots need matplotlib: `pip install ftaccum[plots]`.", "note"),
        page.heading("Trials"),
        page.table(cells, list(rows[0]) if rows else ()),
    ]
    return page.page(f"Search {study.study_name}", parts)


def _page_figure(name: str, drawn: "Figure") -> str:
    """Return a figure for the page, which shows its title itself."""
    axes = drawn.axes[0]
    title = axes.get_title()
    axes.set_title("")
    return page.figure(title, as_svg(drawn, title, f"{name}-"))


def _new_figure(height: float = 2.9) -> "tuple[Figure, Axes]":
    """Return a new figure with axes."""
    figure = new_figure(4.4, height)
    return figure, figure.subplots()


def _trials_with_value(study: Study, *states: TrialState) -> list[FrozenTrial]:
    trials = study.get_trials(deepcopy=False, states=states)
    return [trial for trial in trials if trial.values and math.isfinite(trial.values[0])]


def plot_history(study: Study) -> "Figure | None":
    """Plot each trial's loss or metric, and the best so far, over the rows that all trials had trained on by then."""
    trials = sorted(
        _trials_with_value(study, TrialState.COMPLETE, TrialState.PRUNED),
        key=lambda trial: trial.datetime_complete.timestamp() if trial.datetime_complete else 0,
    )
    if not trials:
        return None
    rows = np.cumsum([trial.user_attrs.get("rows", 0) for trial in trials])
    finished = [trial.state == TrialState.COMPLETE for trial in trials]
    values = np.array([trial.values[0] for trial in trials])
    is_greater_better = criterion_of(study).greater_is_better
    accumulate, worst = (np.maximum, -np.inf) if is_greater_better else (np.minimum, np.inf)
    best = accumulate.accumulate(np.where(finished, values, worst))
    figure, axes = _new_figure()
    axes.scatter(rows, values, c=[_FINISHED if done else _PRUNED for done in finished], label="trials (gray: pruned)")
    axes.step(rows, np.where(np.isinf(best), np.nan, best), where="post", color=_BEST, label="best finished")
    axes.set(title="History", xlabel="rows trained on, all trials", ylabel=criterion_of(study).name)
    axes.legend()
    return figure


def plot_curves(study: Study) -> "Figure | None":
    """Plot the losses or metrics of each trial, pruned or finished, over the rows that it has trained on."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.intermediate_values]
    if not trials:
        return None
    best = best_trial(study)
    figure, axes = _new_figure()
    for trial in trials:
        finished = trial.state == TrialState.COMPLETE
        color = _BEST if best is not None and trial.number == best.number else _FINISHED if finished else _PRUNED
        steps, values = zip(*sorted(trial.intermediate_values.items()), strict=True)
        axes.plot(steps, values, marker=".", color=color, zorder=2 if finished else 1)
    axes.set(title="Trials (gray: pruned, red: best)", xlabel="rows trained on", ylabel=criterion_of(study).name)
    return figure


def plot_contour(study: Study) -> "Figure | None":
    """Plot the loss or metric over k and learning rate: a point per finished trial, and contours if there are three or
    more. Pruned trials are gray crosses, because their values come from fewer rows."""
    finished, pruned = (_trials_with_value(study, state) for state in (TrialState.COMPLETE, TrialState.PRUNED))
    if not finished:
        return None
    figure, axes = _new_figure()
    x, y = _coordinates(finished)
    values, criterion = np.array([trial.values[0] for trial in finished]), criterion_of(study)
    colors = "viridis" if criterion.greater_is_better else "viridis_r"  # the best trials are yellow
    if _spans_a_plane(x, y):
        axes.tricontourf(x, y, values, levels=12, cmap=colors, alpha=0.6)
    if pruned:
        axes.scatter(*_coordinates(pruned), c=_PRUNED, marker="x", label="pruned", clip_on=False)
        figure.legend(loc="outside upper right", ncols=2)
    drawn = axes.scatter(x, y, c=values, cmap=colors, edgecolors="0.5", label="finished", clip_on=False)
    figure.colorbar(drawn, label=criterion.name)
    every_k = sorted({trial.params[STEPS] for trial in finished + pruned})
    axes.set_yticks(np.log2(every_k), [str(k) for k in every_k])
    axes.margins(0.05)
    axes.set(title="Trials by k and learning rate", xlabel="log10 of the learning rate", ylabel="accumulation steps k")
    return figure


def _coordinates(trials: list[FrozenTrial]) -> tuple[np.ndarray, np.ndarray]:
    """Return the logarithms of the trials' learning rates (base 10) and k (base 2)."""
    rates = np.array([trial.user_attrs.get(RATE, trial.params.get(RATE)) for trial in trials], dtype=float)
    return np.log10(rates), np.log2(np.array([trial.params[STEPS] for trial in trials], dtype=float))


def _spans_a_plane(x: np.ndarray, y: np.ndarray) -> bool:
    distinct = np.unique(np.stack([x, y], axis=1), axis=0)
    return len(distinct) > 2 and int(np.linalg.matrix_rank(distinct - distinct[0], tol=1e-9)) == 2


def plot_importances(study: Study) -> "Figure | None":
    """Plot the importance of each parameter for the loss or metric."""
    shares = parameter_importances(study)
    if not shares:
        return None
    figure, axes = _new_figure(0.8 + 0.5 * len(shares))
    axes.barh(list(shares)[::-1], list(shares.values())[::-1], color=_FINISHED)
    axes.set(title="Importance", xlabel="share")
    return figure


PLOTS: dict[str, Callable[[Study], "Figure | None"]] = {
    "history": plot_history,
    "curves": plot_curves,
    "contour": plot_contour,
    "importance": plot_importances,
}
