"""Where a study is kept."""

import importlib.util
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, GrpcStorageProxy, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import NullPool, event, make_url
from sqlalchemy.exc import ArgumentError

from ...errors import SettingsError
from .retry import GRACE, run_again

_HEARTBEAT = 20  # seconds between two signs of life of a running trial
_TRIES, _PAUSE = 6, 0.5  # of making the tables, where several workers begin at once
_THERE_ALREADY = ("already exists", "unique", "duplicate")  # as databases say it of tables and rows


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
                f"`storage` {without_password(storage)!r} cannot be opened: {error} Give a URL that Optuna knows "
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
                grace_period=GRACE,
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


def without_password(url: str) -> str:
    """A storage's URL as it may be shown: a password can be in the query as well."""
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
