"""The table of a study with a row per trial, its best trial, and the importance of each parameter."""

import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from ...tracking.selection import LOSS, Criterion
from .retry import REASON, is_given_up
from .space import RATE, STEPS
from .study import criterion_of

_STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
_LAST_COLUMNS = ("rows", "seconds", "state")
_MIN_FINISHED = 4  # finished trials that importances need to be meaningful


def describe_trial(trial: FrozenTrial, criterion: Criterion, resumed_as: int | None = None) -> dict[str, Any]:
    """Return a trial's row of the table, by column. The learning rate is the one that the run used.

    Args:
        criterion: that of the study.
        resumed_as: the number of the trial that resumed this one, if it was interrupted. That trial counts its rows.
    """
    attrs, parameters = trial.user_attrs, dict(trial.params)
    k, rate = parameters.pop(STEPS, None), parameters.pop(RATE, None)
    return {
        "trial": trial.number,
        "k": k,
        "effective batch": attrs.get("effective_batch_size"),
        "learning rate": attrs.get(RATE, rate),
        **parameters,
        **_losses_of(trial, criterion, {"trial", "k", "effective batch", "learning rate", *parameters}),
        "rows": None if resumed_as is not None else attrs.get("rows"),
        "seconds": None if "training_time" not in attrs else round(attrs["training_time"], 1),
        "state": _describe_state(trial) if resumed_as is None else f"interrupted, resumed as trial {resumed_as}",
    }


def _losses_of(trial: FrozenTrial, criterion: Criterion, taken: set[str]) -> dict[str, Any]:
    """Return a trial's loss and metrics, by column.

    Args:
        criterion: that of the study. The trial's value is its last loss, or its last value of this metric.
        taken: names of other columns. A metric of such a name is called "metric …".
    """
    value, metrics = trial.values[0] if trial.values else None, trial.user_attrs.get("metrics") or {}
    is_loss = criterion.metric == LOSS
    if not is_loss:
        metrics = {criterion.metric: value} | metrics
    taken = {*taken, "loss", *_LAST_COLUMNS}
    named = {f"metric {name}" if name in taken else name: value for name, value in metrics.items()}
    return {"loss": value if is_loss else trial.user_attrs.get("val_loss"), **named}


def _resumptions(trials: Sequence[FrozenTrial]) -> dict[int, int]:
    """Return the numbers of interrupted trials whose runs were resumed, and the last trials that resumed them.

    A trial that resumes the run of another one has the same output folder. Its rows include those of that run.
    """
    last = {trial.user_attrs.get("output_dir"): trial.number for trial in trials}
    of = {trial.number: last[trial.user_attrs.get("output_dir")] for trial in trials}
    return {
        trial.number: of[trial.number]
        for trial in trials
        if trial.user_attrs.get("output_dir") and of[trial.number] != trial.number
    }


def _describe_state(trial: FrozenTrial) -> str:
    if is_given_up(trial):
        return "failed: the workers that ran it died repeatedly"
    if trial.state == TrialState.FAIL:
        return f"failed: {trial.user_attrs[REASON]}" if REASON in trial.user_attrs else "interrupted"
    return trial.user_attrs.get(REASON, _STATES[trial.state])


def trial_rows(study: Study) -> list[dict[str, Any]]:
    """Return a row per trial, all with the same columns: its parameters, loss, metrics, rows, seconds and state."""
    trials = study.get_trials(deepcopy=False)
    criterion, resumed_as = criterion_of(study), _resumptions(trials)
    rows = [describe_trial(trial, criterion, resumed_as.get(trial.number)) for trial in trials]
    first: dict[str, None] = {}
    losses: dict[str, None] = {}
    for row in rows:
        names = [name for name in row if name not in _LAST_COLUMNS]
        first |= dict.fromkeys(names[: names.index("loss")])
        losses |= dict.fromkeys(names[names.index("loss") :])
    return [{name: row.get(name) for name in (*first, *losses, *_LAST_COLUMNS)} for row in rows]


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a plain-text table."""
    if not rows:
        return "no trials"
    cells = [list(rows[0]), *([format_value(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line[:-1], widths[:-1], strict=True)) + "  " + line[-1]
        for line in cells
    )


def format_value(value: Any) -> str:
    """Return a cell as text: four decimals for usual losses, three digits for very small and large numbers."""
    if value is None:
        return "-"
    if isinstance(value, float) and value != round(value, 1):
        return f"{value:.4f}" if 0.01 <= abs(value) < 1000 else f"{value:.3g}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def format_trial(trial: FrozenTrial, criterion: Criterion) -> str:
    """Return a line that describes a trial."""
    cells = describe_trial(trial, criterion)
    number, state = cells.pop("trial"), cells.pop("state")
    known = "  ".join(f"{name} {format_value(value)}" for name, value in cells.items() if value is not None)
    return f"trial {number:>3}  {known}  {state}"


def best_trial(study: Study) -> FrozenTrial | None:
    """Return the finished trial with the best loss or metric, even with two objectives; None if no trial finished."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign = _sign_of(study)
    return min(finished, key=lambda trial: sign * trial.values[0], default=None)


def _sign_of(study: Study) -> int:
    """Return the factor with which lower values are better."""
    return -1 if criterion_of(study).greater_is_better else 1


def parameter_importances(study: Study) -> dict[str, float]:
    """Return the importance of each parameter for the loss or metric, as shares of 1 (PED-ANOVA, arXiv:2304.10255).

    The result is empty if too few trials finished.
    """
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < _MIN_FINISHED:
        return {}
    sign = _sign_of(study)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The parameters' importance for reaching low values of the target.
        return optuna.importance.get_param_importances(study, target=lambda trial: sign * trial.values[0])


def summarize(study: Study) -> str:
    """Return the result of a search in a few lines."""
    best, criterion = best_trial(study), criterion_of(study)
    name = "loss" if criterion.metric == LOSS else criterion.metric
    lines = ["No trial finished. The table gives the reasons."]
    if best is not None:
        parameters = ", ".join(f"{name} {format_value(value)}" for name, value in best.params.items())
        lines = [
            f"{f'best {name}':<21} {format_value(best.values[0])} (trial {best.number}, of those that finished)",
            f"best parameters       {parameters}",
            f"effective batch size  {best.user_attrs.get('effective_batch_size')}",
        ]
        rate = best.user_attrs.get(RATE)
        if RATE in best.params and rate != best.params[RATE]:
            lines.append(f"learning rate, scaled {format_value(rate)}")
    if shares := parameter_importances(study):
        lines.append("importance            " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    if len(study.directions) > 1:
        lines += [f"best trade-offs of {name} and time"] + [
            f"  trial {t.number:>3}  {name} {t.values[0]:.4f}  {t.values[1]:.1f} s" for t in study.best_trials
        ]
    rows = sum(row["rows"] or 0 for row in trial_rows(study))
    return "\n".join([*lines, f"rows trained on       {rows}"])
