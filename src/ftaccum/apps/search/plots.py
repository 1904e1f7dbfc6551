"""A study's plots. Drawn on figures of their own: matplotlib's global state is the user's."""

import math
from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from .space import STEPS
from .tables import describe_trial, importance

_PRUNED, _FINISHED, _BEST = "0.65", "C0", "C3"


def _ended(study: Study) -> list[FrozenTrial]:
    """Finished and pruned trials that have a loss."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return [trial for trial in trials if trial.values and math.isfinite(trial.values[0])]


def history(study: Study) -> Figure | None:
    """Losses over the rows that the search had trained on when each trial ended, and the best finished so far."""
    trials = sorted(
        _ended(study), key=lambda trial: trial.datetime_complete.timestamp() if trial.datetime_complete else 0
    )
    if not trials:
        return None
    rows = np.cumsum([trial.user_attrs.get("rows", 0) for trial in trials])
    finished = [trial.state == TrialState.COMPLETE for trial in trials]
    losses = np.array([trial.values[0] for trial in trials])
    best = np.minimum.accumulate(np.where(finished, losses, np.inf))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(rows, losses, c=[_FINISHED if done else _PRUNED for done in finished], label="trials (grey: pruned)")
    axes.step(rows, np.where(np.isinf(best), np.nan, best), where="post", color=_BEST, label="best finished")
    axes.set(title="History", xlabel="rows trained on, all trials", ylabel="validation loss")
    axes.legend()
    return figure


def curves(study: Study) -> Figure | None:
    """Validation losses of each trial over its rows, pruned and finished ones on one axis."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.intermediate_values]
    if not trials:
        return None
    best = min((t for t in _ended(study) if t.state == TrialState.COMPLETE), key=lambda t: t.values[0], default=None)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for trial in trials:
        finished = trial.state == TrialState.COMPLETE
        color = _BEST if best is not None and trial.number == best.number else _FINISHED if finished else _PRUNED
        steps = sorted(trial.intermediate_values)
        values = [trial.intermediate_values[step] for step in steps]
        axes.plot(steps, values, marker=".", color=color, zorder=2 if finished else 1)
    axes.set(title="Trials (grey: pruned, red: best)", xlabel="rows trained on", ylabel="validation loss")
    return figure


def contour(study: Study) -> Figure | None:
    """The loss over k and learning rate: a point a finished trial, and what lies between three or more of them. Pruned
    ones are crosses without a colour: their losses are of fewer rows."""
    finished = [trial for trial in _ended(study) if trial.state == TrialState.COMPLETE]
    pruned = [trial for trial in _ended(study) if trial.state == TrialState.PRUNED]
    if not finished:
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    x, y = _places(finished)
    losses = np.array([trial.values[0] for trial in finished])
    if _spans_a_plane(x, y):
        axes.tricontourf(x, y, losses, levels=12, cmap="viridis_r", alpha=0.6)
    if pruned:
        axes.scatter(*_places(pruned), c=_PRUNED, marker="x", label="pruned", clip_on=False)
        figure.legend(loc="outside upper right", ncols=2)
    drawn = axes.scatter(x, y, c=losses, cmap="viridis_r", edgecolors="black", label="finished", clip_on=False)
    figure.colorbar(drawn, label="validation loss")
    every_k = sorted({trial.params[STEPS] for trial in finished + pruned})
    axes.set_yticks(np.log2(every_k), [str(k) for k in every_k])
    axes.margins(0.05)
    axes.set(title="Loss by k and learning rate", xlabel="log10 of the learning rate", ylabel="accumulation steps k")
    return figure


def _places(trials: list[FrozenTrial]) -> tuple[np.ndarray, np.ndarray]:
    """Where trials lie: the logarithms of learning rate and k."""
    rates = np.array([describe_trial(trial)["learning rate"] for trial in trials], dtype=float)
    return np.log10(rates), np.log2(np.array([trial.params[STEPS] for trial in trials], dtype=float))


def _spans_a_plane(x: np.ndarray, y: np.ndarray) -> bool:
    distinct = np.unique(np.stack([x, y], axis=1), axis=0)
    return len(distinct) > 2 and int(np.linalg.matrix_rank(distinct - distinct[0], tol=1e-9)) == 2


def importances(study: Study) -> Figure | None:
    """How much of the spread of the losses each parameter explains."""
    found = importance(study)
    if not found:
        return None
    figure = Figure(figsize=(8, 0.8 + 0.5 * len(found)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(found)[::-1], list(found.values())[::-1], color=_FINISHED)
    axes.set(title="Importance", xlabel="share")
    return figure


PLOTS: dict[str, Callable[[Study], Figure | None]] = {
    "history": history,
    "curves": curves,
    "contour": contour,
    "importance": importances,
}
