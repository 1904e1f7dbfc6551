"""A study in words and numbers: a line a trial, what is best, what matters."""

import warnings
from typing import Any

import optuna
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from .retry import REASON, is_given_up
from .space import RATE, STEPS

_STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
_FEWEST = 4  # finished trials, below which shares of importance mean nothing


def describe_trial(trial: FrozenTrial) -> dict[str, Any]:
    """What a table says of a trial, by column. A coupled rate is the one that was used."""
    attrs, parameters = trial.user_attrs, dict(trial.params)
    k, rate = parameters.pop(STEPS, None), parameters.pop(RATE, None)
    return {
        "trial": trial.number,
        "k": k,
        "effective batch": attrs.get("effective_batch_size"),
        "learning rate": attrs.get(RATE, rate),
        **parameters,
        "loss": trial.values[0] if trial.values else None,
        "rows": attrs.get("rows"),
        "seconds": None if "training_time" not in attrs else round(attrs["training_time"], 1),
        "state": _state(trial),
    }


def _state(trial: FrozenTrial) -> str:
    if is_given_up(trial):
        return "failed: the workers that ran it died, again and again"
    if trial.state == TrialState.FAIL:
        return f"failed: {trial.user_attrs[REASON]}" if REASON in trial.user_attrs else "interrupted"
    return trial.user_attrs.get(REASON, _STATES[trial.state])


def table(study: Study) -> list[dict[str, Any]]:
    """A row a trial; all rows have the same columns."""
    rows = [describe_trial(trial) for trial in study.get_trials(deepcopy=False)]
    last = ("loss", "rows", "seconds", "state")
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in last))
    return [{name: row.get(name) for name in (*columns, *last)} for row in rows]


def as_text(rows: list[dict[str, Any]]) -> str:
    """A table for a screen."""
    if not rows:
        return "no trials"
    cells = [list(rows[0]), *([shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line[:-1], widths[:-1], strict=True)) + "  " + line[-1]
        for line in cells
    )


def shown(value: Any) -> str:
    """A cell: losses to four places, small numbers so that they can be read."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if value == round(value, 1):
            return f"{value:g}"
        return f"{value:.4f}" if 0.01 <= abs(value) < 1000 else f"{value:.3g}"
    return str(value)


def line_of(trial: FrozenTrial) -> str:
    """A trial in one line."""
    facts = describe_trial(trial)
    number, state = facts.pop("trial"), facts.pop("state")
    known = "  ".join(f"{name} {shown(value)}" for name, value in facts.items() if value is not None)
    return f"trial {number:>3}  {known}  {state}"


def best_trial(study: Study) -> FrozenTrial | None:
    """The finished trial of lowest loss; where time was traded, too. None where no trial finished."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return min(finished, key=lambda trial: trial.values[0], default=None)


def importance(study: Study) -> dict[str, float]:
    """How much of the spread of the losses each parameter explains (PED-ANOVA, arXiv:2304.10255); empty where there are
    too few finished trials to tell."""
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < _FEWEST:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.importance.get_param_importances(study, target=lambda trial: trial.values[0])


def summary(study: Study) -> str:
    """What came of a search."""
    best = best_trial(study)
    lines = ["No trial finished; the table says why."]
    if best is not None:
        parameters = ", ".join(f"{name} {shown(value)}" for name, value in best.params.items())
        lines = [
            f"best loss             {shown(best.values[0])} (trial {best.number})",
            f"best parameters       {parameters}",
            f"effective batch size  {best.user_attrs.get('effective_batch_size')}",
        ]
        rate = best.user_attrs.get(RATE)
        if RATE in best.params and rate != best.params[RATE]:
            lines.append(f"learning rate, scaled {shown(rate)}")
    matters = importance(study)
    if matters:
        lines.append("importance            " + ", ".join(f"{name} {share:.0%}" for name, share in matters.items()))
    if len(study.directions) > 1:
        lines += ["best trades of loss and time"] + [
            f"  trial {t.number:>3}  loss {t.values[0]:.4f}  {t.values[1]:.1f} s" for t in study.best_trials
        ]
    rows = sum(trial.user_attrs.get("rows", 0) for trial in study.get_trials(deepcopy=False))
    lines.append(f"rows trained on       {rows}")
    return "\n".join(lines)
