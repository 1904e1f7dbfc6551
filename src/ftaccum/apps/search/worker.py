"""A worker, which runs trials of a study one by one until the study has `n_trials`."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna import Study, Trial
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import BaseTrial, FixedTrial, TrialState

from ...checkpoint.directory import CheckpointDirectory
from ...errors import DataError, SettingsError
from ...runtime.run_dir import RunDir
from ...runtime.signals import StopSignals
from .definition import Search
from .processes import OutOfStepError, TrialProcesses
from .retry import (
    FIRST,
    INTERRUPTED,
    REASON,
    WORKER,
    is_counted,
    is_dead,
    position_of,
    requeue,
    requeue_dead,
    this_worker,
)
from .space import COUPLED, RATE, STEPS
from .study import has_heartbeat
from .trial import TrialCallback, TrialResult, run_trial
from .trial_record import StudyTrialRecord, TrialRecord

ON_INTERRUPT = (
    "Interrupted: the running trial stops after its next update, and will run again when the search is resumed. "
    "Ctrl-C (again) stops at once."
)
_POLL = 2.0  # seconds between checks of other workers


class _EndedError(Exception):
    """An error that makes Optuna record a trial as failed. If the trial counts, its attributes give the reason."""


@dataclass(frozen=True)
class TrialOrder:
    """An order to run a trial, which the main process sends to all processes.

    Attributes:
        number: the number of the trial in its study.
        first: the number of the interrupted trial that this one resumes; None for a new trial.
        params: the parameters that the main process has drawn.
    """

    number: int
    first: int | None
    params: dict[str, Any]


@dataclass(frozen=True)
class TrialExecutor:
    """An executor of trials. Each process has one, and all of them run the same trial.

    Attributes:
        search: the search.
        processes: the processes that run each trial together.
        stop_signals: signals that stop the search after the next update of the running trial.
    """

    search: Search
    processes: TrialProcesses
    stop_signals: StopSignals

    def arguments_of(self, trial: BaseTrial) -> dict[str, Any]:
        """Return all arguments of a trial except the model."""
        search = self.search
        # The state of a callback must not pass from one trial to the next.
        fixed = {**search.fixed, "callbacks": copy.deepcopy(search.fixed["callbacks"])}
        return search.space.suggest(trial, fixed, search.batch_size(self.processes.size))

    def folder_of(self, order: TrialOrder) -> Path | None:
        """Return the output folder of a trial. A trial that resumes an interrupted one uses that one's folder."""
        number = order.number if order.first is None else order.first
        return None if self.search.folder is None else self.search.folder / "trials" / f"{number:04d}"

    def run(self, order: TrialOrder, arguments: dict[str, Any], record: TrialRecord) -> TrialResult:
        """Run a trial and return its outcome. If one process fails, all processes return a failure."""
        search, settings, folder = self.search, self.search.settings, self.folder_of(order)
        batch_size = search.batch_size(self.processes.size)
        own = {"output_dir": folder and str(folder), "resume": "auto" if folder and order.first is not None else None}
        attributes = {
            "effective_batch_size": arguments[STEPS] * batch_size,
            "learning_rate": arguments[RATE],
            "output_dir": own["output_dir"],
        }
        self.processes.orders.run_on_main(lambda: record.start(attributes))
        callback = TrialCallback(
            self.processes,
            record,
            self.stop_signals,
            search.criterion,
            batch_sizes=[k * batch_size for k in search.space.candidates()],
            n_reports=1 if settings.trade_time else settings.n_reports,  # without pruning, only the last report counts
            title=f"trial {order.number}: k = {arguments[STEPS]}, lr {arguments[RATE]:.2g}",
            is_first=order.number == 0,
        )
        outcome = run_trial(search.model_factory, arguments | own | {"progress": search.progress}, callback)
        outcomes = self.processes.gather_outcomes((outcome.kind, outcome.reason))
        failure = next((reason for kind, reason in outcomes if kind == "failed"), None)
        if failure is not None and outcome.kind != "failed":
            return TrialResult("failed", failure)
        if outcome.result is not None:
            beta2 = {"beta2": arguments[COUPLED].beta2} if settings.couple_beta2 else {}
            training_time, metrics = outcome.result.training_time, outcome.result.metrics[-1]
            val_loss = outcome.result.final_loss
            record.finish({"training_time": training_time, "val_loss": val_loss, "metrics": metrics, **beta2})
        return outcome


class Worker:
    """The main process of a worker. It asks the study for trials, and reports their outcomes to the study."""

    def __init__(self, executor: TrialExecutor, study: Study, storage: BaseStorage) -> None:
        self._executor, self._study, self._storage = executor, study, storage
        self._settings = executor.search.settings
        self._is_reassigned = False
        self._folder: Path | None = None  # of the current trial
        self._silent: dict[int, float] = {}

    def work(self, on_trial: Callable[[], None]) -> None:
        """Run trials until the study has enough.

        Args:
            on_trial: called whenever trials may have ended.
        """
        while (order := self._next()) != "stop":
            self._executor.stop_signals.check()
            if order == "wait":
                time.sleep(_POLL)
            else:
                self._run_one()
            on_trial()

    def _next(self) -> str:
        """Return what to do next: "run", "wait" or "stop"."""
        requeue_dead(self._study, self._silent)
        trials = self._study.get_trials(deepcopy=False)
        ended = sum(map(is_counted, trials))
        running = [t for t in trials if t.state == TrialState.RUNNING]
        if ended >= self._settings.n_trials:
            return "stop"
        if ended + len(running) < self._settings.n_trials:
            return "run"
        # Other workers are running the remaining trials. If one of them dies, this worker takes over its trial.
        shows_death = has_heartbeat(self._storage) or any(is_dead(t.user_attrs.get(WORKER)) is False for t in running)
        return "wait" if shows_death else "stop"

    def _run_one(self) -> None:
        self._is_reassigned, self._folder = False, None
        try:
            # One trial at a time; `optimize` sends the heartbeat while the trial runs.
            self._study.optimize(self._objective, n_trials=1, catch=(_EndedError,))
        except (UpdateFinishedTrialError, ValueError) as error:
            # Other workers assumed that this one was dead, and ended its trial.
            if not self._is_reassigned and not str(error).startswith("Cannot tell a"):
                raise
        else:
            self._remove_checkpoints()

    def _remove_checkpoints(self) -> None:
        """Remove the checkpoints of a trial that the study has recorded as ended. A trial that runs again, in this
        worker or another, needs them to resume."""
        if self._folder is not None:
            CheckpointDirectory(RunDir(self._folder.absolute()).checkpoints).clear()

    def _objective(self, trial: Trial) -> float | tuple[float, float]:
        if position_of(self._study, trial) >= self._settings.n_trials:
            raise _EndedError  # two workers asked for the last trial, this one second
        try:
            trial.set_user_attr(WORKER, this_worker())
            return self._value_of(trial, self._run(trial))
        except UpdateFinishedTrialError:
            self._is_reassigned = True
            raise
        except (KeyboardInterrupt, OutOfStepError):
            self._requeue(trial)
            raise

    def _run(self, trial: Trial) -> TrialResult:
        executor = self._executor
        try:
            arguments = executor.arguments_of(trial)
        except StorageInternalError:
            raise
        except SettingsError as error:
            return TrialResult("failed", str(error), error=error)
        except Exception as error:  # raised by a function of the user
            return TrialResult("failed", f"{type(error).__name__}: {error}")
        order = TrialOrder(trial.number, trial.user_attrs.get(FIRST), trial.params)
        if order.first is not None and (folder := executor.folder_of(order)) and RunDir(folder.absolute()).is_locked():
            # The worker that runs the interrupted trial is still alive. Start this one afresh, in its own folder.
            order = TrialOrder(trial.number, None, trial.params)
        self._folder = executor.folder_of(order)
        executor.processes.orders.broadcast(order)
        return executor.run(order, arguments, StudyTrialRecord(self._study, trial, self._settings))

    def _value_of(self, trial: Trial, outcome: TrialResult) -> float | tuple[float, float]:
        """Return the value of a trial for Optuna, or raise the error that Optuna expects if it did not finish."""
        if outcome.result is not None:
            value, seconds = outcome.value, outcome.result.training_time
            if math.isfinite(value):
                return (value, seconds) if self._settings.trade_time else value
            outcome = TrialResult("diverged", f"with a final value of {value}")
        if outcome.kind == "reassigned":
            self._is_reassigned = True
        elif outcome.error is not None and self._concerns_all(outcome.error):
            self._requeue(trial)  # to run once the user has fixed the error
            raise outcome.error
        else:
            trial.set_user_attr(REASON, ("" if outcome.kind == "failed" else f"{outcome.kind} ") + outcome.reason)
            if outcome.kind != "failed" and not self._settings.trade_time:
                raise optuna.TrialPruned(outcome.reason)
        raise _EndedError(outcome.reason)

    def _requeue(self, trial: Trial) -> None:
        trial.set_user_attr(INTERRUPTED, True)
        requeue(self._study, next(t for t in self._study.get_trials() if t.number == trial.number))

    def _concerns_all(self, error: SettingsError | DataError) -> bool:
        """Return whether every trial would raise this error. All trials have the same data and settings, unless a
        function of the trial returns some settings. Then the error concerns all trials if none has succeeded yet."""
        if isinstance(error, SettingsError) and callable(self._executor.search.space.others):
            return not self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        return True


def follow(executor: TrialExecutor) -> Any:
    """Run the trials that the main process orders, on a process without a study. Return the last message received.

    Raises:
        SettingsError, DataError: if such an error ended the search.
        OutOfStepError: if another error ended it. The main process raises that error.
    """
    last_error: BaseException | None = None
    while isinstance(order := executor.processes.orders.broadcast(), TrialOrder):
        arguments = executor.arguments_of(FixedTrial(order.params, order.number))
        try:
            last_error = executor.run(order, arguments, TrialRecord()).error
        except OutOfStepError:
            raise
        except (Exception, KeyboardInterrupt) as error:  # the main process raises it too, and decides how to continue
            last_error = error
    if order is None:
        raise last_error or OutOfStepError("The main process ended the search. Its own error gives the reason.")
    return order
