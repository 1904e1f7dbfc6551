"""Start processes as forks of this one, which has already imported everything.

Importing torch and Transformers takes eight seconds, which is too long for a run that is killed and restarted a hundred
times.
"""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

_LOOK_EVERY = 0.002  # seconds


class Team:
    """The processes of one start, with the environment variables that a launcher would set.

    Attributes:
        statuses: exit statuses of the processes that have ended, by rank; minus the signal number for a signal.
    """

    def __init__(self, work: Callable[[int], int], logs: Sequence[Path]) -> None:
        """Args:
        work: function that each process runs with its rank; returns the exit status.
        logs: output file of each process.
        """
        self.statuses: dict[int, int] = {}
        launched = {"WORLD_SIZE": str(len(logs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        sys.stdout.flush()
        self._ids: list[int] = []
        for rank, log in enumerate(logs):
            log.touch()  # may be read before the process has opened it
            ranked = {"RANK": str(rank), "LOCAL_RANK": str(rank), **launched} if len(logs) > 1 else {}
            self._ids.append(os.fork() or _worked(work, rank, ranked, log))

    def send(self, rank: int, number: int) -> bool:
        """Send a signal to a process, and return whether the process was still running."""
        self._look()
        if rank in self.statuses:
            return False
        os.kill(self._ids[rank], number)
        return True

    def end(self) -> None:
        """Kill all processes that still run."""
        for rank in range(len(self._ids)):
            self.send(rank, signal.SIGKILL)

    def over(self, within: float) -> bool:
        """Wait until all processes have ended, for at most this many seconds. Return whether they have."""
        return self.until(lambda: False, within) or self._all_ended

    def until(self, reached: Callable[[], bool], within: float) -> bool:
        """Wait until `reached` returns true, all processes have ended, or the seconds are over.

        Returns:
            The last value of `reached`.
        """
        deadline = time.monotonic() + within
        while not (now := reached()) and time.monotonic() < deadline:
            self._look()
            if self._all_ended:
                break
            time.sleep(_LOOK_EVERY)
        return now

    @property
    def _all_ended(self) -> bool:
        return len(self.statuses) == len(self._ids)

    def _look(self) -> None:
        for rank, process in enumerate(self._ids):
            if rank not in self.statuses:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)


def _worked(work: Callable[[int], int], rank: int, launched: dict[str, str], log: Path) -> int:
    """Run a forked process. Never returns."""
    status = 1
    try:
        os.environ.update(launched)
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        status = work(rank)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
