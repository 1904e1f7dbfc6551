"""Servers that store a study, started only for tests: PostgreSQL and Optuna's gRPC proxy."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
PATIENCE = 90.0  # seconds; anything that takes longer has failed, even on a busy machine

# Child processes can import from the tests' folder and use one thread each.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "OMP_NUM_THREADS": "1",
}


def wait_until(ready: Callable[[], Any], what: str, every: float = 0.05) -> None:
    """Wait until `ready()` is true."""
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline, f"in {PATIENCE:.0f} s never: {what}"
        time.sleep(every)


def script(name: str, *arguments: str) -> list[str]:
    """Return the command that runs a script of `tests/processes`."""
    return [sys.executable, str(TESTS / "processes" / name), *arguments]


class Postgres:
    """A running server that creates databases on request."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._n_databases = folder, 0

    def url(self, database: str) -> str:
        # A socket in the folder needs no port, which another program might take at the same moment.
        return f"postgresql://tests@/{database}?host={self._folder}"

    def empty_database(self) -> str:
        """Create a database and return its URL."""
        self._n_databases += 1
        self._execute(f"CREATE DATABASE study_{self._n_databases}")
        return self.url(f"study_{self._n_databases}")

    def answers(self) -> bool:
        import psycopg

        try:
            self._execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def _execute(self, statement: str) -> None:
        import psycopg

        with closing(psycopg.connect(host=str(self._folder), user="tests", dbname="postgres")) as connection:
            connection.autocommit = True  # a transaction cannot create a database
            connection.cursor().execute(statement)


def no_postgres_because() -> str | None:
    """Return why this machine cannot run the server, or None if it can."""
    if _programs() is None:
        return "PostgreSQL's server is not installed: pg_config does not lead to initdb and postgres"
    if os.geteuid() == 0 and _unprivileged() is None:
        return "PostgreSQL does not run as root, and there is no user 'postgres' or 'nobody' to run it as"
    return None


def _programs() -> Path | None:
    """Return the folder of the server's programs. Debian leaves them off the PATH, as versions can coexist."""
    if (pg_config := shutil.which("pg_config")) is None:
        return None
    folder = Path(subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=True).stdout.strip())
    return folder if all((folder / program).exists() for program in ("initdb", "postgres")) else None


def _unprivileged() -> pwd.struct_passwd | None:
    return next((user for user in pwd.getpwall() if user.pw_name in ("postgres", "nobody")), None)


@contextmanager
def postgresql() -> Iterator[Postgres]:
    """Run a PostgreSQL server with a cluster of its own. On exit, always stop the server and delete its folder.

    For tests only: the server loses data if the machine fails, and everyone on this machine can connect to it.
    """
    programs = _programs()
    assert programs is not None
    # Not one of pytest's folders: other users cannot enter them, and their paths are too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="ftaccum-postgresql-", dir="/tmp"))
    try:
        identity: dict[str, Any] = {}
        if os.geteuid() == 0 and (user := _unprivileged()) is not None:
            identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(folder, user.pw_uid, user.pw_gid)
        data, log = folder / "data", folder / "log"
        make = [str(programs / "initdb"), "-D", str(data), "-U", "tests", "-A", "trust", "-E", "UTF8", "--locale=C"]
        made = subprocess.run([*make, "--no-sync"], cwd=folder, capture_output=True, text=True, **identity)
        assert made.returncode == 0, made.stdout + made.stderr
        settings = {"listen_addresses": "", "unix_socket_directories": str(folder), "fsync": "off"}
        serve = [
            str(programs / "postgres"),
            "-D",
            str(data),
            *(f"--{name}={value}" for name, value in settings.items()),
        ]
        with log.open("wb") as file:
            server = subprocess.Popen(serve, cwd=folder, stdout=file, stderr=file, **identity)
        with _ended(server, signal.SIGINT):  # SIGINT does not wait for clients to disconnect
            postgres = Postgres(folder)
            wait_until(lambda: server.poll() is not None or postgres.answers(), "the server answers")
            assert server.poll() is None, log.read_text()
            yield postgres
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def grpc_proxy(storage: str) -> Iterator[str]:
    """Run Optuna's proxy for a database and yield its URL for a search."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(script("optuna_proxy.py", storage, str(port)), env=ENVIRONMENT)
    with _ended(server, signal.SIGTERM):
        yield f"grpc://127.0.0.1:{port}"


@contextmanager
def _ended(process: "subprocess.Popen[bytes]", how: signal.Signals) -> Iterator[None]:
    try:
        yield
    finally:
        process.send_signal(how)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
