"""How trials end: which of them count, and which have to run again."""

import contextlib
import time
import warnings

import optuna
from optuna import Study, Trial
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from .liveness import is_gone

# Names of attributes: why a trial did not finish, who runs it, that it was interrupted by hand, which trial it is
# another run of, and how many of its workers died.
REASON, WORKER, INTERRUPTED, FIRST, DEATHS = "reason", "worker", "interrupted", "first_run", "deaths"
IF_INTERRUPTED = (
    "Interrupted: the running trial ends with its next update, and will run again. Once more stops at once."
)
GRACE = 120  # seconds without a sign of life until a worker is taken for dead: loading a model takes its time
_RUNS_AT_MOST = 4  # of a trial whose workers die; it may be what kills them


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of `n_trials`: it came to an end by itself. What was interrupted runs again as another."""
    if trial.state == TrialState.FAIL:
        return REASON in trial.user_attrs or is_given_up(trial)
    return trial.state.is_finished()


def is_given_up(trial: FrozenTrial) -> bool:
    """Whether a trial's workers have died so often that it is not run again."""
    died = trial.state == TrialState.FAIL and not {REASON, INTERRUPTED} & trial.user_attrs.keys()
    return died and trial.user_attrs.get(DEATHS, 0) >= _RUNS_AT_MOST - 1


def place_of(study: Study, trial: FrozenTrial | Trial) -> int:
    """How many trials come before this one, interrupted ones left out: they run again under another number."""
    before = (t for t in study.get_trials(deepcopy=False) if t.number < trial.number)
    return sum(counts(t) or not t.state.is_finished() for t in before)


def run_again(study: Study, trial: FrozenTrial) -> None:
    """Queues an interrupted trial's parameters up, for whoever is free next. Not where they are already, or where it
    came to an end and only its state does not say so yet."""
    first = trial.user_attrs.get(FIRST, trial.number)
    later = (t for t in study.get_trials(deepcopy=False) if t.number > trial.number)
    if REASON in trial.user_attrs or is_given_up(trial) or any(t.user_attrs.get(FIRST) == first for t in later):
        return
    deaths = trial.user_attrs.get(DEATHS, 0) + (INTERRUPTED not in trial.user_attrs)
    # Not its other attributes: they speak of the run that was interrupted, of its worker for one.
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={FIRST: first, DEATHS: deaths},
            system_attrs={name: value for name, value in trial.system_attrs.items() if name == "fixed_params"},
        )
    )


def find_dead(study: Study, silent: dict[int, float]) -> None:
    """Has the trials of dead workers run again: those of this machine at once, others by their heartbeat.

    Args:
        silent: trials of which nothing but that they run is known, and since when; kept from call to call.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if is_gone(trial.user_attrs.get(WORKER)) or _never_began(trial, silent):
            # Another worker may have seen it, too; the one that is first has it run again.
            with contextlib.suppress(ValueError, UpdateFinishedTrialError):
                run_again(study, study.tell(trial.number, state=TrialState.FAIL))


def _never_began(trial: FrozenTrial, silent: dict[int, float]) -> bool:
    """Whether a worker died as soon as it had got the trial, before its first sign of life."""
    if WORKER in trial.user_attrs:
        return False
    return time.monotonic() - silent.setdefault(trial.number, time.monotonic()) > GRACE
