"""Start processes with the variables that torchrun sets, wait for them, and kill them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .job import Job

_LOOK_EVERY = 0.1  # seconds
_FOR_THE_OTHERS = 20.0  # seconds to end in, after one process has failed


class PartError(Exception):
    """A part that failed, with the reason."""


class Processes:
    """The processes of one job, each with a log file. They are killed on exit of the context."""

    def __init__(self, job: Job) -> None:
        self.folder = Path(job.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        job.write(self.folder / "job.json")
        n, port = job.num_processes, _free_port()
        self._logs = [self.folder / f"{rank}.log" for rank in range(n)]
        self._running = [self._start(rank, n, port) for rank in range(n)]

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: Any) -> None:
        self.kill()

    def kill(self) -> None:
        """Send SIGKILL to all processes, and wait for their ends."""
        for process in self._running:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        for process in self._running:
            process.wait()

    def wait(self, seconds: float, reached: Callable[[], bool] = lambda: False) -> bool:
        """Wait until `reached` returns true, or all processes have ended. Return the last value of `reached`.

        Raises:
            PartError: if a process fails, or the time is over.
        """
        deadline = time.monotonic() + seconds
        while not reached():
            statuses = [process.poll() for process in self._running]
            if any(statuses):
                self._let_end(statuses)
            if all(status == 0 for status in statuses):
                return reached()
            if time.monotonic() > deadline:
                raise PartError(f"out of time; raise `--minutes`. The log of the main process ends: {self._tail(0)}")
            time.sleep(_LOOK_EVERY)
        return True

    def results(self) -> list[Any]:
        """Return what each process has written."""
        return [json.loads((self.folder / f"{rank}.json").read_text()) for rank in range(len(self._logs))]

    def _start(self, rank: int, n: int, port: int) -> subprocess.Popen[bytes]:
        threads = max(1, (os.cpu_count() or 1) // n)
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            "TOKENIZERS_PARALLELISM": "false",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # for deterministic sums, in the part that resumes
            **({"MASTER_ADDR": "127.0.0.1"} | {k: str(v) for k, v in launched.items()} if n > 1 else {}),
        }
        command = [sys.executable, "-m", "gpu_checks.work", str(self.folder / "job.json"), str(rank)]
        with self._logs[rank].open("wb") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def _let_end(self, statuses: list[int | None]) -> None:
        """Give other processes a moment after one has failed, and raise its error."""
        failed = next(rank for rank, status in enumerate(statuses) if status)
        deadline = time.monotonic() + _FOR_THE_OTHERS
        while time.monotonic() < deadline and any(process.poll() is None for process in self._running):
            time.sleep(_LOOK_EVERY)
        raise PartError(f"process {failed} ended with status {statuses[failed]}: {self._tail(failed)}")

    def _tail(self, rank: int) -> str:
        lines = self._logs[rank].read_text(errors="replace").strip().splitlines()
        return " / ".join(line.strip() for line in lines[-3:]) or "(nothing was printed)"


def run(job: Job) -> list[Any]:
    """Run a job on its processes, and return what each has written.

    Raises:
        PartError: if a process fails, or the time is over.
    """
    with Processes(job) as processes:
        processes.wait(job.seconds)
        return processes.results()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
