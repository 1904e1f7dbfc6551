"""A search whose study is on a server: workers share it and one dies, or Optuna's proxy serves it."""

import os
import signal
import subprocess
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import NullPool

from ftaccum import SettingsError
from ftaccum.apps.search.retry import DEATHS, WORKER, is_counted
from ftaccum.apps.search.study import has_heartbeat, open_storage
from searching import quick
from servers import ENVIRONMENT, Postgres, grpc_proxy, no_postgres_because, postgresql, script, wait_until

N_TRIALS = 12


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    pytest.importorskip("psycopg", reason="psycopg, which talks to PostgreSQL, is not installed")
    if reason := no_postgres_because():
        pytest.skip(reason)
    with postgresql() as server:
        yield server


# --- PostgreSQL


class Workers:
    """Groups of three workers, forked by a program that has already imported all that they need."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._program: subprocess.Popen[str] | None = None

    @contextmanager
    def sharing(self, url: str, where: str) -> Iterator[tuple[list[int], list[int]]]:
        """Start a study with three processes, and yield their ids and a list. On exit, wait until all have ended and
        put their statuses in the list."""
        program = self._program = self._program or self._started()
        assert program.stdin is not None
        assert program.stdout is not None
        statuses: list[int] = []
        try:
            print(url, N_TRIALS, where, file=program.stdin, flush=True)
            yield [int(number) for number in program.stdout.readline().split()], statuses
            statuses += [int(status) for status in program.stdout.readline().split()]
        except BaseException:
            self.end()
            raise
        finally:
            print(self._log.read_text())

    def end(self) -> None:
        """End the program and its remaining workers. The next group gets a new program."""
        if self._program is not None:
            os.killpg(self._program.pid, signal.SIGKILL)
            self._program.communicate()
            self._program = None

    def _started(self) -> "subprocess.Popen[str]":
        with self._log.open("w") as file:
            return subprocess.Popen(
                script("search_of_three.py"),
                env=ENVIRONMENT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,  # a process group of its own, with its workers
            )


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    found = Workers(tmp_path_factory.mktemp("workers") / "log")
    yield found
    found.end()


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("where", ["here", "elsewhere"], ids=["of_one_machine", "of_several_machines"])
def test_one_of_three_workers_can_be_killed(where: str, postgres: Postgres, workers: Workers) -> None:
    """They start simultaneously on an empty database, so any of them may create the tables and the study."""
    url = postgres.empty_database()
    with workers.sharing(url, where) as (processes, statuses):
        killed = killed_in_a_trial(processes[0], url)
    assert statuses == [-signal.SIGKILL, 0, 0]
    trials = study_at(url).get_trials()
    assert all(trial.state.is_finished() for trial in trials)
    ended = [trial for trial in trials if is_counted(trial)]
    assert len(ended) == N_TRIALS
    assert trials[0].params["gradient_accumulation_steps"] == 1  # the queued trial came first
    assert {worker_of(trial) for trial in ended} >= {*processes[1:]}
    assert trials[killed.number].state == TrialState.FAIL
    (again,) = (trial for trial in ended if trial.user_attrs.get("first_run") == killed.number)
    assert again.params == killed.params
    assert again.user_attrs[DEATHS] >= 1


def study_at(url: str) -> optuna.Study:
    """Wait until the workers have created their study, and return it."""
    found: list[optuna.Study] = []

    def is_there() -> bool:
        with suppress(Exception):
            # The workers create the tables. This process leaves no connection open.
            once = {"poolclass": NullPool}
            storage = RDBStorage(url, once, skip_table_creation=True, skip_compatibility_check=True)
            found.append(optuna.load_study(study_name="shared", storage=storage))
        return bool(found)

    wait_until(is_there, "there is a study")
    return found[0]


def killed_in_a_trial(worker: int, url: str) -> FrozenTrial:
    """Kill a worker in the middle of its first trial, and return that trial as it was."""
    found: list[FrozenTrial] = []

    def is_in_one() -> bool:
        # Stop the worker before the check, or it might move on before it is killed.
        os.kill(worker, signal.SIGSTOP)
        time.sleep(0.05)  # for the server to finish earlier requests
        running = study.get_trials(states=(TrialState.RUNNING,))
        found.extend(t for t in running if worker_of(t) == worker and t.user_attrs.get("rows", 0) > 0)
        if not found:
            os.kill(worker, signal.SIGCONT)
        return bool(found)

    study = study_at(url)
    wait_until(is_in_one, "the worker is in the middle of a trial")
    os.kill(worker, signal.SIGKILL)
    return found[0]


def worker_of(trial: FrozenTrial) -> int | None:
    return trial.user_attrs.get(WORKER, {}).get("process")


@pytest.mark.slow
def test_dead_workers_of_a_server_are_detected(postgres: Postgres) -> None:
    assert has_heartbeat(open_storage(postgres.empty_database(), None))


def test_a_password_is_not_shown_where_the_server_cannot_be_reached() -> None:
    pytest.importorskip("psycopg", reason="psycopg, which talks to PostgreSQL, is not installed")
    nobody_listens = "postgresql://someone:hush@127.0.0.1:1/studies?password=hush&connect_timeout=1"
    with pytest.raises(
        SettingsError, match=r"'postgresql://someone:\*\*\*@127\.0\.0\.1:1/studies' cannot be opened"
    ) as caught:
        quick(storage=nobody_listens, study_name="mine")
    assert "hush" not in "".join(traceback.format_exception(caught.value))


# --- Optuna's proxy


@pytest.mark.slow
@pytest.mark.processes
def test_a_study_behind_optunas_proxy_reports_that_it_has_no_heartbeat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("grpc", reason="grpcio, which talks to Optuna's proxy, is not installed")
    pytest.importorskip("google.protobuf", reason="protobuf, which talks to Optuna's proxy, is not installed")
    database = f"sqlite:///{tmp_path / 'study.db'}"
    with grpc_proxy(database) as url:
        study = quick(storage=url, study_name="far", progress=True)
        assert sum(map(is_counted, study.trials)) == len(study.trials) == 4
        assert "this storage has no heartbeat" in capsys.readouterr().out
        assert not has_heartbeat(open_storage(url, None))
        assert len(quick(storage=url, study_name="far", n_trials=5).trials) == 5  # the study continues
    assert len(optuna.load_study(study_name="far", storage=database).trials) == 5
