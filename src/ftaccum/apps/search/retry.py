"""Decide which trials count, and which run again because their worker died or was interrupted."""

import contextlib
import os
import platform
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna import Study, Trial
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

# User attributes of a trial: why it did not finish, the process that runs it, whether a user interrupted it, the number
# of its first run, and how many of its workers died.
REASON, WORKER, INTERRUPTED, FIRST, DEATHS = "reason", "worker", "interrupted", "first_run", "deaths"
GRACE = 120  # seconds without a heartbeat after which a worker counts as dead; loading a model can take long
_MAX_RUNS = 4  # of a trial whose workers die: the trial itself may be the cause
_CLOCK_CHANGE = 60.0  # seconds by which the clock may be adjusted while a process runs


def is_counted(trial: FrozenTrial) -> bool:
    """Return whether a trial counts towards `n_trials`: it ended, and does not run again under another number."""
    if trial.state == TrialState.FAIL:
        return REASON in trial.user_attrs or is_given_up(trial)
    return trial.state.is_finished()


def is_given_up(trial: FrozenTrial) -> bool:
    """Return whether a trial will not run again because its workers died too often."""
    died = trial.state == TrialState.FAIL and not {REASON, INTERRUPTED} & trial.user_attrs.keys()
    return died and trial.user_attrs.get(DEATHS, 0) >= _MAX_RUNS - 1


def n_counted(study: Study) -> int:
    """Return how many trials of a study count towards `n_trials`."""
    return sum(map(is_counted, study.get_trials(deepcopy=False)))


def position_of(study: Study, trial: FrozenTrial | Trial) -> int:
    """Return how many trials come before this one, except those that run again under another number."""
    before = (t for t in study.get_trials(deepcopy=False) if t.number < trial.number)
    return sum(is_counted(t) or not t.state.is_finished() for t in before)


def requeue(study: Study, trial: FrozenTrial) -> None:
    """Queue the parameters of an interrupted trial for the next free worker.

    Do nothing if they are already queued, or if the trial is over and the study has not recorded it yet. Optuna's
    `RetryHeartbeatStaleTrialCallback` would also copy the attributes, which describe the interrupted run: its dead
    worker, and the rungs that a pruner recorded.
    """
    first = trial.user_attrs.get(FIRST, trial.number)
    later = (t for t in study.get_trials(deepcopy=False) if t.number > trial.number)
    if REASON in trial.user_attrs or is_given_up(trial) or any(t.user_attrs.get(FIRST) == first for t in later):
        return
    deaths = trial.user_attrs.get(DEATHS, 0) + (INTERRUPTED not in trial.user_attrs)
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={FIRST: first, DEATHS: deaths},
            system_attrs={name: value for name, value in trial.system_attrs.items() if name == "fixed_params"},
        )
    )


def requeue_dead(study: Study, silent: dict[int, float]) -> None:
    """Queue the trials of dead workers again. Workers on this machine are checked directly, others by heartbeat.

    Args:
        silent: for running trials without a worker's mark, by number, when they were first seen so. The caller keeps
            it between calls.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if is_dead(trial.user_attrs.get(WORKER)) or _never_began(trial, silent):
            # Other workers may notice this at the same time. The first one queues the trial.
            with contextlib.suppress(ValueError, UpdateFinishedTrialError):
                requeue(study, study.tell(trial.number, state=TrialState.FAIL))


def _never_began(trial: FrozenTrial, silent: dict[int, float]) -> bool:
    """Return whether a worker seems to have died after it took the trial, before it marked the trial as its own."""
    if WORKER in trial.user_attrs:
        return False
    return time.monotonic() - silent.setdefault(trial.number, time.monotonic()) > GRACE


def this_worker() -> dict[str, Any]:
    """Return values that identify this process to other workers."""
    return {"machine": _machine(), "process": os.getpid(), "started": psutil.Process().create_time()}


def is_dead(worker: Mapping[str, Any] | None) -> bool | None:
    """Return whether a worker on this machine has ended; None if it is unknown or on another machine."""
    if not worker or worker["machine"] != _machine():
        return None
    try:
        process = psutil.Process(worker["process"])
        # The system reuses process ids, and lists an ended process as a zombie until its parent reads its status.
        is_another = abs(process.create_time() - worker["started"]) > _CLOCK_CHANGE
        return is_another or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _machine() -> str:
    """Return an id of this machine since its last boot, and of the container, which has its own process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return platform.node()
