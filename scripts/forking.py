"""Processes that have imported everything already: forks of this one, which has, and does nothing else.

Importing torch and Transformers takes eight seconds, and a run that is killed a hundred times is started as often.
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
    """The processes of one start, with what a launcher would have told them.

    Attributes:
        statuses: of those that have ended, by rank: the exit status, or minus the signal that ended it.
    """

    def __init__(self, work: Callable[[int], int], logs: Sequence[Path]) -> None:
        """Args:
        work: what each of them does, given its rank. Returns its exit status.
        logs: a file for what each of them says.
        """
        self.statuses: dict[int, int] = {}
        launched = {"WORLD_SIZE": str(len(logs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        sys.stdout.flush()
        self._ids: list[int] = []
        for rank, log in enumerate(logs):
            log.touch()  # for whoever reads it before the process has got so far
            ranked = {"RANK": str(rank), "LOCAL_RANK": str(rank), **launched} if len(logs) > 1 else {}
            self._ids.append(os.fork() or _worked(work, rank, ranked, log))

    def send(self, rank: int, number: int) -> bool:
        """Sends a signal, and says whether there was still somebody to get it."""
        self._look()
        if rank in self.statuses:
            return False
        os.kill(self._ids[rank], number)
        return True

    def end(self) -> None:
        """Kills what is left of them."""
        for rank in range(len(self._ids)):
            self.send(rank, signal.SIGKILL)

    def over(self, within: float) -> bool:
        """Waits until all have ended, or for as many seconds, and says whether they have."""
        return self.until(lambda: False, within) or self._all_ended

    def until(self, reached: Callable[[], bool], within: float) -> bool:
        """Waits until something is so, and says whether it is: all have ended before, or the seconds are over, where it
        is not."""
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
    """The life of a fork; never returns."""
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
