"""The record of a trial: what its study stores of it."""

from collections.abc import Mapping
from typing import Any

from optuna import Study, Trial
from optuna.exceptions import UpdateFinishedTrialError

from .samplers import make_pruner
from .settings import SearchSettings
from .study import check_budget


class TrialRecord:
    """The record of a trial on a process without a study. It stores nothing."""

    def start(self, attributes: Mapping[str, Any]) -> None:
        """Record the attributes that are known before the trial runs."""

    def set_milestones(self, steps: Mapping[int, int]) -> None:
        """Record the milestones of the trial: steps by number of rows. The last is the budget."""

    def report(self, step: int, rows: int, value: float) -> str:  # noqa: ARG002
        """Record the value of the trial at a milestone; NaN if the trial has diverged.

        Returns:
            "continue", "prune", or "leave" if other workers assumed that this one was dead, and ended its trial.
        """
        return "continue"

    def finish(self, attributes: Mapping[str, Any]) -> None:
        """Record the attributes of a trial that ran to its end."""


class StudyTrialRecord(TrialRecord):
    """The record of a trial in its study."""

    def __init__(self, study: Study, trial: Trial, settings: SearchSettings) -> None:
        self._study, self._trial, self._settings = study, trial, settings

    def start(self, attributes: Mapping[str, Any]) -> None:
        self.finish({**attributes, "rows": 0})

    def set_milestones(self, steps: Mapping[int, int]) -> None:
        check_budget(self._study, max(steps))
        self._study.pruner = make_pruner(self._settings.pruner, steps.values())

    def report(self, step: int, rows: int, value: float) -> str:
        try:
            self._trial.set_user_attr("rows", rows)
            if self._settings.trade_time:  # Optuna accepts no reports with two objectives
                return "continue"
            self._trial.report(value, step)
            return "prune" if self._trial.should_prune() else "continue"
        except UpdateFinishedTrialError:
            return "leave"

    def finish(self, attributes: Mapping[str, Any]) -> None:
        for name, value in attributes.items():
            self._trial.set_user_attr(name, value)
