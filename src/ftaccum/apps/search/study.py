"""The study of a search and the storage that keeps it."""

import importlib.util
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna import Study
from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.pruners import NopPruner
from optuna.storages import BaseStorage, GrpcStorageProxy, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from sqlalchemy import NullPool, event, make_url
from sqlalchemy.exc import ArgumentError

from ...arguments import read_settings
from ...errors import DataError, SettingsError, refuse
from ...runtime.run_dir import RunDir
from ...settings.recipe import Recipe
from ...tracking.selection import LOSS, Criterion
from .definition import Search
from .retry import GRACE, requeue
from .samplers import make_sampler
from .space import STEPS

_SETUP, _BUDGET = "ftaccum", "budget_rows"  # attributes of a study: its settings, the rows of a trial
_FILE = "study.db"  # in the output folder, if there is no other storage
_BEFORE_METRICS = {"metric_for_best": LOSS, "greater_is_better": False}  # of studies that do not record them
_HEARTBEAT = 20  # seconds between heartbeats of a running trial
_TRIES, _PAUSE = 6, 0.5  # for workers that create the tables or the study at the same time
_QUOTED = str.maketrans({character: f"%{ord(character):02X}" for character in "%?#{}"})
_SQLITE_OPTIONS = {"timeout", "isolation_level", "detect_types", "check_same_thread", "cached_statements"}
_EXISTS_ALREADY = ("already exists", "unique", "duplicate")  # in errors of databases about tables and rows


def open_study(search: Search, num_processes: int) -> tuple[Study, BaseStorage]:
    """Open the study of a search, or create it, and return it with its storage.

    Raises:
        SettingsError: if the storage cannot be opened, or the study was created with different settings.
    """
    folder, settings = search.folder, search.settings
    if folder is not None:
        RunDir(folder.absolute()).check()
        folder.mkdir(parents=True, exist_ok=True)
    storage, name = open_storage(settings.storage, folder), _name_of(search)
    setup, dimensions = _setup(search, num_processes), search.space.dimensions()
    directions = _directions_of(search)
    try:
        study = optuna.create_study(storage=storage, study_name=name, directions=directions)
    except DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=name)
        _wait_for_setup(study)
    else:
        study.enqueue_trial({STEPS: 1})
    if study.directions != directions:  # of a study without settings; otherwise, say which setting differs
        _check_setup(study, setup)
        raise SettingsError(
            [
                f"The study {study.study_name!r} has the directions {_named(study.directions)}, but this search has "
                f"{_named(directions)}. Give another `study_name`."
            ]
        )
    if _SETUP not in study.user_attrs:  # set last: it marks the study as ready for other workers
        study.set_user_attr(_SETUP, setup)
    _check_setup(study, setup)
    _check_dimensions(study, dimensions)
    study.sampler = make_sampler(settings, study)
    study.pruner = NopPruner()  # until the first trial knows its milestones
    return study, storage


def check_study(search: Search, num_processes: int) -> None:
    """Compare a search with its study, if there is one already. Create none.

    Raises:
        SettingsError: if the storage cannot be opened, or the study was created with different settings.
    """
    folder, storage = search.folder, search.settings.storage
    if not storage and (folder is None or not (folder / _FILE).exists()):
        return
    try:
        study = optuna.load_study(storage=open_storage(storage, folder), study_name=_name_of(search))
    except KeyError:  # there is no study of this name
        return
    if _SETUP in study.user_attrs:
        _check_setup(study, _setup(search, num_processes))
        _check_dimensions(study, search.space.dimensions())


def _name_of(search: Search) -> str:
    """Return the name of the search's study."""
    return search.settings.study_name or (search.folder.resolve().name if search.folder else "search")


def _directions_of(search: Search) -> list[StudyDirection]:
    direction = StudyDirection.MAXIMIZE if search.criterion.greater_is_better else StudyDirection.MINIMIZE
    return [direction, StudyDirection.MINIMIZE] if search.settings.trade_time else [direction]


def _named(directions: Sequence[StudyDirection]) -> str:
    return ", ".join(direction.name.lower() for direction in directions)


def criterion_of(study: Study) -> Criterion:
    """Return the criterion by which the trials of a study are compared."""
    metric = study.user_attrs.get(_SETUP, _BEFORE_METRICS).get("metric_for_best", LOSS)
    return Criterion(metric, study.directions[0] == StudyDirection.MAXIMIZE)


def _setup(search: Search, num_processes: int) -> dict[str, Any]:
    """Return the settings that must be equal for trials to be comparable: the Recipe without the searched arguments,
    and what decides where trials report."""
    settings = search.settings
    read = vars(read_settings(Recipe, search.fixed))  # an optimizer that has no name is None
    recipe = {name: value for name, value in read.items() if name not in search.space.dimensions()}
    return {
        **recipe,
        "metric_for_best": search.criterion.metric,
        "greater_is_better": search.criterion.greater_is_better,
        "batch_size": search.fixed["batch_size"],
        "num_processes": num_processes,
        "accumulation_steps": search.space.candidates(),
        "couple_learning_rate": settings.couple_learning_rate,
        "couple_beta2": settings.couple_beta2,
        "reference_batch_size": settings.reference_batch_size,
        "n_reports": settings.n_reports,
        "trade_time": settings.trade_time,
    }


def _wait_for_setup(study: Study) -> None:
    """Wait until the worker that created the study has set it up. Give up after a while: it may not be a search's."""
    for _ in range(_TRIES):
        if _SETUP in study.user_attrs:
            return
        time.sleep(_PAUSE)


def _check_setup(study: Study, setup: dict[str, Any]) -> None:
    before = _BEFORE_METRICS | study.user_attrs.get(_SETUP, {})
    faults = [
        f"The study {study.study_name!r} was created with `{name}` {before[name]!r}, and this search has {value!r}. "
        "Their trials cannot be compared. Give the same value, or another `study_name`."
        for name, value in setup.items()
        if name in before and before[name] != value
    ]
    refuse(faults)


def _check_dimensions(study: Study, dimensions: Mapping[str, BaseDistribution]) -> None:
    """Raise SettingsError if Optuna cannot combine a dimension with that of the same name in earlier trials."""
    faults = {}
    for trial in study.get_trials(deepcopy=False):
        for name in dimensions.keys() & trial.distributions.keys():
            try:
                check_distribution_compatibility(trial.distributions[name], dimensions[name])
            except ValueError:
                faults[name] = (
                    f"The study {study.study_name!r} has trials with `{name}` from {trial.distributions[name]}, and "
                    f"this search has {dimensions[name]}. Only the ends of a range may change. Give the same "
                    "distribution, or another `study_name`."
                )
    refuse(faults.values())


def check_budget(study: Study, rows: int) -> None:
    """Record the budget of a trial. Raise DataError if earlier trials of the study had another, and so other data."""
    budget = study.user_attrs.get(_BUDGET)
    if budget is None:
        study.set_user_attr(_BUDGET, rows)
    elif budget != rows:
        raise DataError(
            f"The trials of the study {study.study_name!r} have {budget} rows each, but with this `train_data` a "
            f"trial has {rows}. They cannot be compared. Give the same data, or another `study_name`."
        )


def open_storage(storage: Any, folder: Path | None) -> BaseStorage:
    """Open the storage that `storage` names. None opens SQLite in the folder, or memory if there is no folder.

    Raises:
        SettingsError: if the storage cannot be opened.
    """
    if storage is None:
        if folder is None:
            return InMemoryStorage()
        storage = sqlite_url(folder / _FILE)
    if not isinstance(storage, str):
        return storage
    kind, separator, rest = storage.partition("://")
    try:
        if not separator:
            return JournalStorage(JournalFileBackend(storage))
        if kind == "grpc":
            host, _, port = rest.rpartition(":")
            proxy = _without_warnings(GrpcStorageProxy, host=host, port=int(port))
            proxy.wait_server_ready(timeout=30)
            return proxy
        return _open_database(storage)
    except SettingsError:
        raise
    except Exception as error:
        raise SettingsError(
            [
                f"`storage` {hide_password(storage)!r} cannot be opened: {error} Give a URL that Optuna knows "
                "(sqlite:///study.db, postgresql://user@host/name), grpc://host:port, or the path of a journal file."
            ]
        ) from error


def sqlite_url(path: Path) -> str:
    """Return the URL of a database file. Characters that are special in a URL are percent-encoded."""
    return f"sqlite:///{str(path.resolve()).translate(_QUOTED)}"


def _check_query(url: str) -> None:
    """Raise SettingsError if the part after "?" is not a list of options: SQLAlchemy would drop it from the path."""
    path, _, query = url.partition("?")
    names = {option.partition("=")[0] for option in query.split("&")} if query else set()
    if "uri" not in names and names - _SQLITE_OPTIONS:
        raise SettingsError(
            [
                f"`storage` {url!r} would open {path.partition(':///')[2]!r}: options follow a question mark in a URL, "
                f"here {query!r}. Write a question mark that is part of the path as %3F."
            ]
        )


def _open_database(url: str) -> RDBStorage:
    if url.startswith("postgresql://"):  # its default driver depends on the version of SQLAlchemy
        url = url.replace("://", "+psycopg://" if importlib.util.find_spec("psycopg") else "+psycopg2://", 1)
    is_sqlite = url.startswith("sqlite")
    if is_sqlite:
        _check_query(url)
    # Close connections after use, so that many workers need few of a server's connections. SQLite's writers wait for
    # each other; the default timeout is too short for many workers.
    engine = {"poolclass": NullPool, "connect_args": {"timeout": 60} if is_sqlite else {}}
    for tries_left in reversed(range(_TRIES)):
        try:
            database = _without_warnings(
                RDBStorage,
                url,
                engine_kwargs=engine,
                heartbeat_interval=_HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=requeue,
            )
            return _lock_early(database) if is_sqlite else database
        except optuna.exceptions.StorageInternalError:
            raise
        except Exception as error:
            # If two workers create the tables at the same time, the database rejects the second.
            if not tries_left or not any(words in str(error).lower() for words in _EXISTS_ALREADY):
                raise
            time.sleep(_PAUSE)
    raise AssertionError


def _lock_early(storage: RDBStorage) -> RDBStorage:
    """Make SQLite lock the database when a transaction begins. It cannot lock rows, so two workers could otherwise
    both read that a trial is free, and both take it."""

    def begin_by_ourselves(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # otherwise Python begins transactions, and later

    event.listen(storage.engine, "connect", begin_by_ourselves)
    event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    storage.engine.dispose()
    return storage


def _without_warnings(make: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return make(*arguments, **named)


def hide_password(url: str) -> str:
    """Return the URL of a storage without its password and its query, which may hold a password as well."""
    try:
        return make_url(url).set(query={}).render_as_string(hide_password=True)
    except ArgumentError:  # a path, or not a URL at all
        return url.partition("@")[0].partition("?")[0]


def has_heartbeat(storage: BaseStorage) -> bool:
    """Return whether workers notice when one dies on another machine. Only relational databases support it."""
    return isinstance(storage, RDBStorage) and storage.get_heartbeat_interval() is not None
