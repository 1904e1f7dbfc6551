"""What is written down of a trial while it runs."""

from collections.abc import Mapping
from typing import Any

from optuna import Study, Trial
from optuna.exceptions import UpdateFinishedTrialError

from .samplers import pruner_of
from .settings import SearchSettings
from .study import check_budget


class TrialRecord:
    """Keeps nothing: of the processes that have no study."""

    def open(self, facts: Mapping[str, Any]) -> None:
        """Takes what is known of a trial before it runs."""

    def begin(self, steps: Mapping[int, int]) -> None:
        """Takes the milestones of the trial: rows → steps, the last being its budget."""

    def report(self, step: int, rows: int, val_loss: float) -> str:  # noqa: ARG002
        """Takes the validation loss at a milestone, and says what to do: "go on", "prune", or "leave", where others
        have taken the trial's worker for dead and given it up."""
        return "go on"

    def close(self, facts: Mapping[str, Any]) -> None:
        """Takes what is known of a trial that ran to its end."""


class StudyTrialRecord(TrialRecord):
    """Keeps a trial in its study."""

    def __init__(self, study: Study, trial: Trial, settings: SearchSettings) -> None:
        self._study, self._trial, self._settings = study, trial, settings

    def open(self, facts: Mapping[str, Any]) -> None:
        for name, value in {**facts, "rows": 0}.items():
            self._trial.set_user_attr(name, value)

    def begin(self, steps: Mapping[int, int]) -> None:
        check_budget(self._study, max(steps))
        self._study.pruner = pruner_of(self._settings.pruner, steps.values())

    def report(self, step: int, rows: int, val_loss: float) -> str:
        try:
            self._trial.set_user_attr("rows", rows)
            if self._settings.trade_time:  # Optuna takes no reports on two objectives
                return "go on"
            self._trial.report(val_loss, step)
            return "prune" if self._trial.should_prune() else "go on"
        except UpdateFinishedTrialError:
            return "leave"

    def close(self, facts: Mapping[str, Any]) -> None:
        for name, value in facts.items():
            self._trial.set_user_attr(name, value)
