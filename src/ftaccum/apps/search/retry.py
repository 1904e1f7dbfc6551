"""Which trials count, and which run again because their worker died or was interrupted."""

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

# Names of user attributes: why a trial did not finish, which process runs it, that a user interrupted it, which trial
# it is another run of, and how many of its workers died.
REASON, WORKER, INTERRUPTED, FIRST, DEATHS = "reason", "worker", "interrupted", "first_run", "deaths"
GRACE = 120  # seconds without a sign of life after which a worker counts as dead: loading a model takes its time
_MAX_RUNS = 4  # of a trial whose workers die; it may be what kills them
_CLOCK_CHANGE = 60.0  # seconds that a clock may be set by while a process runs


def is_counted(trial: FrozenTrial) -> bool:
    """Return whether a trial is one of `n_trials`: it ended, and does not run again under another number."""
    if trial.state == TrialState.FAIL:
        return REASON in trial.user_attrs or is_given_up(trial)
    return trial.state.is_finished()


def is_given_up(trial: FrozenTrial) -> bool:
    """Return whether a trial does not run again because its workers died too often."""
    died = trial.state == TrialState.FAIL and not {REASON, INTERRUPTED} & trial.user_attrs.keys()
    return died and trial.user_attrs.get(DEATHS, 0) >= _MAX_RUNS - 1


def n_counted(study: Study) -> int:
    """Return how many trials of a study count."""
    return sum(map(is_counted, study.get_trials(deepcopy=False)))


def position_of(study: Study, trial: FrozenTrial | Trial) -> int:
    """Return how many trials come before this one, without those that run again under another number."""
    before = (t for t in study.get_trials(deepcopy=False) if t.number < trial.number)
    return sum(is_counted(t) or not t.state.is_finished() for t in before)


def requeue(study: Study, trial: FrozenTrial) -> None:
    """Queue the parameters of an interrupted trial for the next free worker.

    Do nothing where they are queued already, or where the trial has ended and only its state does not show it yet.
    Optuna's `RetryHeartbeatStaleTrialCallback` would also copy the attributes, which describe the interrupted run: its
    worker, which is dead, and the rungs that a pruner has recorded.
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
    """Queue the trials of dead workers again: of this machine's at once, of others by their heartbeat.

    Args:
        silent: times since when trials run without a sign of life, by number; the caller keeps it between calls.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if is_dead(trial.user_attrs.get(WORKER)) or _never_began(trial, silent):
            # Another worker may see it at the same time. The first of them queues the trial.
            with contextlib.suppress(ValueError, UpdateFinishedTrialError):
                requeue(study, study.tell(trial.number, state=TrialState.FAIL))


def _never_began(trial: FrozenTrial, silent: dict[int, float]) -> bool:
    """Return whether a worker died between its request for the trial and its first sign of life."""
    if WORKER in trial.user_attrs:
        return False
    return time.monotonic() - silent.setdefault(trial.number, time.monotonic()) > GRACE


def this_worker() -> dict[str, Any]:
    """Return what identifies this process to other workers."""
    return {"machine": _machine(), "process": os.getpid(), "started": psutil.Process().create_time()}


def is_dead(worker: Mapping[str, Any] | None) -> bool | None:
    """Return whether a worker of this machine has ended; None for one of another machine, which cannot be seen."""
    if not worker or worker["machine"] != _machine():
        return None
    try:
        process = psutil.Process(worker["process"])
        # The system reuses numbers, and lists a process that ended until its parent asks for the status.
        is_another = abs(process.create_time() - worker["started"]) > _CLOCK_CHANGE
        return is_another or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _machine() -> str:
    """Return a name of this machine since it was started, or of the container, which numbers its own processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return platform.node()
