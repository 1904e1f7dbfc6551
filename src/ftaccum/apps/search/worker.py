"""A worker: takes trials of a study, one after the other, until there are `n_trials` in all."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna import Study, Trial
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import BaseTrial, FixedTrial, TrialState

from ...checkpoint.directory import CheckpointDirectory
from ...errors import DataError, SettingsError
from ...runtime.run_dir import is_locked
from ...runtime.signals import StopSignals
from .book import StudyTrialRecord, TrialRecord
from .definition import Search
from .liveness import here, is_gone
from .processes import OutOfStepError, TrialProcesses
from .retry import FIRST, INTERRUPTED, REASON, WORKER, counts, find_dead, place_of, run_again
from .settings import SearchSettings
from .space import RATE, STEPS
from .storages import tells_deaths
from .trial import TrialCallback, TrialResult, run_trial

_POLL = 2.0  # seconds between two looks at what other workers do


class _EndedError(Exception):
    """Has Optuna note a trial as failed; why is among its attributes, where it counts as one."""


class TrialRunner:
    """The first process of a trial: asks the study for trials, and tells it what became of them."""

    def __init__(
        self, search: Search, processes: TrialProcesses, stop_signals: StopSignals, study: Study, storage: BaseStorage
    ) -> None:
        self._search, self._processes, self._stop_signals = search, processes, stop_signals
        self._study, self._storage = study, storage
        self._left = False
        self._folder: Path | None = None  # of the trial at hand
        self._silent: dict[int, float] = {}

    def work(self, on_trial: Callable[[], None]) -> None:
        """Takes trials until none is left.

        Args:
            on_trial: called whenever trials may have come to an end.
        """
        while (order := self._next()) != "stop":
            self._stop_signals.check()
            if order == "wait":
                time.sleep(_POLL)
            else:
                self._take_one()
            on_trial()

    def _next(self) -> str:
        """What there is to do: "go", "wait" or "stop"."""
        find_dead(self._study, self._silent)
        trials = self._study.get_trials(deepcopy=False)
        ended = sum(map(counts, trials))
        running = [t for t in trials if t.state == TrialState.RUNNING]
        if ended >= self._search.settings.n_trials:
            return "stop"
        if ended + len(running) < self._search.settings.n_trials:
            return "go"
        # All that is left is being run by others. If one of them dies, its trial will be this worker's.
        heard_of = tells_deaths(self._storage) or any(is_gone(t.user_attrs.get(WORKER)) is False for t in running)
        return "wait" if heard_of else "stop"

    def _take_one(self) -> None:
        self._left, self._folder = False, None
        try:
            # One at a time; `optimize` gives the sign of life while it runs.
            self._study.optimize(self._objective, n_trials=1, catch=(_EndedError,))
        except (UpdateFinishedTrialError, ValueError) as error:
            # Others took this worker for dead, and the trial has ended without it.
            if not self._left and not str(error).startswith("Cannot tell a"):
                raise
        else:
            self._clear()

    def _clear(self) -> None:
        """Removes the checkpoints of a trial that has ended in the study as well. One that runs again goes on from
        them, and those of one that others have taken over are theirs."""
        if self._folder is not None:
            CheckpointDirectory(self._folder).clear()

    def _objective(self, trial: Trial) -> float | tuple[float, float]:
        if self._is_one_too_many(trial):
            raise _EndedError
        try:
            trial.set_user_attr(WORKER, here())
            return self._told(trial, self._tried(trial))
        except UpdateFinishedTrialError:
            self._left = True
            raise
        except (KeyboardInterrupt, OutOfStepError):
            self._run_again(trial)
            raise

    def _tried(self, trial: Trial) -> TrialResult:
        try:
            arguments = arguments_of(self._search, trial, self._processes)
        except StorageInternalError:
            raise
        except SettingsError as error:
            return TrialResult("failed", str(error), error=error)
        except Exception as error:  # a function of the user's
            return TrialResult("failed", f"{type(error).__name__}: {error}")
        first = trial.user_attrs.get(FIRST)
        if first is not None and (folder := folder_of(self._search, trial.number, first)) and is_locked(folder):
            first = None  # its worker was taken for dead, and is not: this one begins anew, in a folder of its own
        self._folder = folder_of(self._search, trial.number, first)
        self._processes.orders.broadcast(("run", (trial.number, first, trial.params)))
        record = StudyTrialRecord(self._study, trial, self._settings)
        return run(self._search, self._processes, self._stop_signals, trial.number, first, arguments, record)

    def _told(self, trial: Trial, outcome: TrialResult) -> float | tuple[float, float]:
        """What Optuna wants of a trial: its value, or an exception that says how it ended."""
        if outcome.result is not None:
            loss, seconds = outcome.result.final_loss, outcome.result.training_time
            if not math.isfinite(loss):
                return self._told(trial, TrialResult("diverged", f"with a final loss of {loss}"))
            return (loss, seconds) if self._settings.trade_time else loss
        if outcome.kind == "left":
            self._left = True
        elif self._befalls_all(outcome.error):
            assert outcome.error is not None
            self._run_again(trial)  # once it is mended
            raise outcome.error
        else:
            how = "" if outcome.kind == "failed" else f"{outcome.kind} "
            trial.set_user_attr(REASON, how + outcome.reason)
            if outcome.kind != "failed" and not self._settings.trade_time:
                raise optuna.TrialPruned(outcome.reason)
        raise _EndedError(outcome.reason)

    @property
    def _settings(self) -> SearchSettings:
        return self._search.settings

    def _run_again(self, trial: Trial) -> None:
        trial.set_user_attr(INTERRUPTED, True)
        run_again(self._study, next(t for t in self._study.get_trials() if t.number == trial.number))

    def _befalls_all(self, error: SettingsError | DataError | None) -> bool:
        """Whether an error is not the trial's own. The data are the same in all, and so are the settings, but for what
        a function of the trial gives: that is taken for wrong in all where none went well yet."""
        if isinstance(error, SettingsError) and callable(self._search.space.others):
            return not self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        return error is not None

    def _is_one_too_many(self, trial: Trial) -> bool:
        """Two workers may both have seen that one trial was left: the one that asked later gives way."""
        return place_of(self._study, trial) >= self._settings.n_trials


def follow(search: Search, processes: TrialProcesses, stop_signals: StopSignals) -> Any:
    """What the other processes of a trial do: the trials that the first one tells. Returns what it says at the end.

    Raises:
        SettingsError, DataError: that ended the search.
        OutOfStepError: where something else did, which the first process raises.
    """
    last_error: BaseException | None = None
    while True:
        order, told = processes.orders.broadcast()
        if order != "run":
            break
        number, first, parameters = told
        arguments = arguments_of(search, FixedTrial(parameters, number), processes)
        try:
            last_error = run(search, processes, stop_signals, number, first, arguments, TrialRecord()).error
        except KeyboardInterrupt as error:  # as the first process was told, which now ends the search
            last_error = error
    if told is None:
        raise last_error or OutOfStepError("The first process ended the search; what it raised says why.")
    return told


def arguments_of(search: Search, trial: BaseTrial, processes: TrialProcesses) -> dict[str, Any]:
    """The arguments of a trial, but for the model."""
    return search.space.suggest(trial, search.fixed, search.batch_size(processes.size))


def folder_of(search: Search, number: int, first: int | None) -> Path | None:
    """Where a trial's outputs go: those of a run that was interrupted, and of the one that goes on from it, alike."""
    return None if search.folder is None else search.folder / "trials" / f"{number if first is None else first:04d}"


def run(
    search: Search,
    processes: TrialProcesses,
    stop_signals: StopSignals,
    number: int,
    first: int | None,
    arguments: dict[str, Any],
    record: TrialRecord,
) -> TrialResult:
    """A trial on all processes, and what became of it on all of them.

    Args:
        first: the number under which it was first begun, if it was interrupted then: it goes on from its checkpoint.
    """
    folder = folder_of(search, number, first)
    kept = {"output_dir": folder and str(folder), "resume": "auto" if folder and first is not None else None}
    batch_size, settings = search.batch_size(processes.size), search.settings
    record.open(
        {
            "effective_batch_size": arguments[STEPS] * batch_size,
            "learning_rate": arguments[RATE],
            "output_dir": kept["output_dir"],
        }
    )
    callback = TrialCallback(
        processes,
        record,
        stop_signals,
        batch_sizes=[k * batch_size for k in search.space.candidates()],
        n_reports=1 if settings.trade_time else settings.n_reports,  # nobody could be told
        title=f"trial {number}: k = {arguments[STEPS]}, lr {arguments[RATE]:.2g}",
    )
    outcome = run_trial(search.model_factory, arguments | kept | {"progress": search.progress}, callback)
    everyone = processes.gather_outcomes((outcome.kind, outcome.reason))
    failed = next((reason for kind, reason in everyone if kind == "failed"), None)
    if failed is not None and outcome.kind != "failed":
        return TrialResult("failed", failed)
    if outcome.result is not None:
        beta2 = {"beta2": arguments["optimizer"].beta2} if settings.couple_beta2 else {}
        record.close({"training_time": outcome.result.training_time, "metrics": outcome.result.metrics[-1], **beta2})
    return outcome
