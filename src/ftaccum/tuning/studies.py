"""The study: where it is kept, what proposes and prunes, which of its trials count, and which have to run again."""

import contextlib
import importlib.util
import math
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna import Study, Trial
from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, UpdateFinishedTrialError
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, GrpcStorageProxy, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import NullPool, event, make_url
from sqlalchemy.exc import ArgumentError

from ..errors import DataError, SettingsError
from ..search_settings import SearchSettings
from .liveness import is_gone

# Seconds between two signs of life of a running trial, and without one until it is taken for dead. A worker that
# loads a model for a minute must not be.
_HEARTBEAT, _GRACE = 20, 120
_RUNS_AT_MOST = 4  # of a trial whose workers die; it may be what kills them
_TRIES, _PAUSE = 6, 0.5  # where several workers begin at once
_THERE_ALREADY = ("already exists", "unique", "duplicate")  # as databases say it of tables and rows

# Names of attributes: of a trial, why it did not finish, who runs it, that it was interrupted by hand, which trial it
# is another run of, and how many of its workers died; of a study, what it was begun with.
REASON, WORKER, INTERRUPTED, FIRST, DEATHS, SETUP = "reason", "worker", "interrupted", "first_run", "deaths", "ftaccum"


def storage_of(storage: Any, folder: Path | None) -> BaseStorage:
    """What `storage` names, or SQLite in the folder, or memory.

    Raises:
        SettingsError: where it cannot be opened.
    """
    if storage is None:
        if folder is None:
            return InMemoryStorage()
        storage = f"sqlite:///{(folder / 'study.db').resolve()}"
    if not isinstance(storage, str):
        return storage
    kind, separator, rest = storage.partition("://")
    try:
        if not separator:
            return JournalStorage(JournalFileBackend(storage))
        if kind == "grpc":
            host, _, port = rest.rpartition(":")
            proxy = _quietly(GrpcStorageProxy, host=host, port=int(port))
            proxy.wait_server_ready(timeout=30)
            return proxy
        return _relational(storage)
    except Exception as error:
        raise SettingsError(
            [
                f"`storage` {_without_password(storage)!r} cannot be opened: {error} Give a URL that Optuna knows "
                "(sqlite:///study.db, postgresql://user@host/name), grpc://host:port, or the path of a journal file."
            ]
        ) from error


def _relational(url: str) -> RDBStorage:
    if url.startswith("postgresql://"):  # which driver that means depends on the version of SQLAlchemy
        url = url.replace("://", "+psycopg://" if importlib.util.find_spec("psycopg") else "+psycopg2://", 1)
    # A connection is closed when it has been used: none is left open, and many workers take few of a server's. SQLite's
    # writers wait for each other, by default not long enough for many of them.
    engine = {"poolclass": NullPool, "connect_args": {"timeout": 60} if url.startswith("sqlite") else {}}
    for tries_left in reversed(range(_TRIES)):
        try:
            made = _quietly(
                RDBStorage,
                url,
                engine_kwargs=engine,
                heartbeat_interval=_HEARTBEAT,
                grace_period=_GRACE,
                heartbeat_stale_trial_callback=run_again,
            )
            return _one_writer_at_a_time(made) if url.startswith("sqlite") else made
        except optuna.exceptions.StorageInternalError:
            raise
        except Exception as error:
            # Two workers that make the tables at once: the later one is told that they are there.
            if not tries_left or not any(words in str(error).lower() for words in _THERE_ALREADY):
                raise
            time.sleep(_PAUSE)
    raise AssertionError


def _one_writer_at_a_time(storage: RDBStorage) -> RDBStorage:
    """Has SQLite lock when a transaction begins. It has no locks of rows, so that otherwise two workers that both read
    that a trial is free would both take it."""

    def begin_by_ourselves(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # or Python's module begins transactions, and later

    event.listen(storage.engine, "connect", begin_by_ourselves)
    event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    storage.engine.dispose()
    return storage


def _without_password(url: str) -> str:
    try:
        return make_url(url).set(query={}).render_as_string(hide_password=True)
    except ArgumentError:  # a path, or no URL at all
        return url.partition("@")[0].partition("?")[0]


def _quietly(make: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return make(*arguments, **named)


def tells_deaths(storage: BaseStorage) -> bool:
    """Whether dead workers of other machines are noticed: by heartbeat, which relational storages alone have."""
    return isinstance(storage, RDBStorage) and storage.get_heartbeat_interval() is not None


def opened(
    storage: BaseStorage,
    name: str,
    settings: SearchSettings,
    setup: dict[str, Any],
    dimensions: Mapping[str, BaseDistribution],
    first: dict[str, Any],
) -> Study:
    """The study of this name, made where there is none.

    Args:
        dimensions: of the search, as far as they are known before a trial asks.
        setup: what decides a trial's result besides its parameters; kept with the study.
        first: parameters of the first trial of a new study.

    Raises:
        SettingsError: where there is a study that was begun otherwise, with what differs.
    """
    directions = [StudyDirection.MINIMIZE] * (2 if settings.trade_time else 1)
    try:
        study = optuna.create_study(storage=storage, study_name=name, directions=directions)
    except DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=name)
        _wait_for_setup(study)
    else:
        study.enqueue_trial(first)
    if SETUP not in study.user_attrs:  # last, when the study is as it should be for others
        study.set_user_attr(SETUP, setup)
    _check_setup(study, setup)
    _check_dimensions(study, dimensions)
    study.sampler = _sampler(settings, study)
    study.pruner = NopPruner()  # until the rows of a trial are known
    return study


def _wait_for_setup(study: Study) -> None:
    """Until whoever made the study has done so; not for ever: it may be one that was made without us."""
    for _ in range(_TRIES):
        if SETUP in study.user_attrs:
            return
        time.sleep(_PAUSE)


def _check_setup(study: Study, setup: dict[str, Any]) -> None:
    begun = study.user_attrs[SETUP]
    faults = [
        f"The study {study.study_name!r} was begun with `{name}` {begun[name]!r}, and is now to go on with {value!r}. "
        "Trials could not be compared: give the same, or another `study_name`."
        for name, value in setup.items()
        if name in begun and begun[name] != value
    ]
    if faults:
        raise SettingsError(faults)


def _check_dimensions(study: Study, dimensions: Mapping[str, BaseDistribution]) -> None:
    """Raises SettingsError where Optuna could not take a dimension beside the one of this name that there was."""
    faults = {}
    for trial in study.get_trials(deepcopy=False):
        for name in dimensions.keys() & trial.distributions.keys():
            try:
                check_distribution_compatibility(trial.distributions[name], dimensions[name])
            except ValueError:
                faults[name] = (
                    f"The study {study.study_name!r} has trials with `{name}` from {trial.distributions[name]}, and is "
                    f"now to go on with {dimensions[name]}. Only the ends of a range may change: give another "
                    "`study_name`."
                )
    if faults:
        raise SettingsError(list(faults.values()))


def check_budget(study: Study, rows: int) -> None:
    """Raises DataError where trials before had another budget: other data, in the same study."""
    budget = study.user_attrs.get("budget_rows")
    if budget is None:
        study.set_user_attr("budget_rows", rows)
    elif budget != rows:
        raise DataError(
            f"The trials of the study {study.study_name!r} were given {budget} rows each, and `train_data` now comes "
            f"to {rows}. Trials could not be compared: give the same data, or another `study_name`."
        )


def pruner_of(pruner: str | BasePruner, steps: Collection[int]) -> BasePruner:
    """A pruner by its name, for trials that report at these steps.

    None of them prunes before a quarter of the budget. Until the warm-up is over losses say little: on the film
    reviews, pruning from an eighth on found a good trial less often than not pruning at all.
    """
    if not isinstance(pruner, str):
        return pruner
    first, budget = sorted(steps)[math.ceil(len(steps) / 4) - 1], max(steps)
    return {
        "successive_halving": lambda: SuccessiveHalvingPruner(min_resource=first, reduction_factor=2),
        "hyperband": lambda: HyperbandPruner(min_resource=first, max_resource=budget, reduction_factor=2),
        "median": lambda: MedianPruner(n_startup_trials=4, n_warmup_steps=first),
        "none": NopPruner,
    }[pruner]()


def _sampler(settings: SearchSettings, study: Study) -> BaseSampler:
    # Optuna's ten draws at random, before what was seen is made use of, would be half of a small search.
    tpe = partial(TPESampler, n_startup_trials=max(4, settings.n_trials // 4))
    kinds: dict[str, Callable[..., BaseSampler]] = {"tpe": tpe, "random": RandomSampler}
    if settings.sampler not in kinds:
        given: Any = settings.sampler
        if any(map(counts, study.get_trials(deepcopy=False))):
            given.reseed_rng()  # or it would draw again what it drew then
        return given
    return SeededByTrial(kinds[settings.sampler], settings.seed, study)


class SeededByTrial(BaseSampler):
    """Draws from a seed and a trial's place in the study: what is proposed depends on the trials so far alone, not on
    how often the search was started again, and two workers do not draw alike."""

    def __init__(self, kind: Callable[..., BaseSampler], seed: int, study: Study) -> None:
        self._kind, self._seed, self._study = kind, seed, study
        self._number, self._sampler = -1, kind(seed=seed)

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number != self._number:
            # Not in the study that Optuna hands over, which is a part of it where Hyperband prunes.
            mixed = np.random.SeedSequence((self._seed, place_of(self._study, trial))).generate_state(1)[0]
            self._number, self._sampler = trial.number, self._kind(seed=int(mixed))
        return self._sampler

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._of(trial).before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self._of(trial).after_trial(study, trial, state, values)


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
    return time.monotonic() - silent.setdefault(trial.number, time.monotonic()) > _GRACE
