"""Worker processes that make batches ahead of time. If a worker dies, no batch is lost."""

import os
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import multiprocessing
from torch.utils.data._utils import worker as _of_torch

from ..errors import DataError

# Forked workers inherit rows and collators, even lambdas. On other systems, these must be picklable.
_PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
_AHEAD = 16  # batches that each worker may make ahead of time
_DYING = 5  # seconds to wait for a process to end, after its pipe broke
# A scheduler may send these to every process of a run. Workers ignore them: the run decides when to end them.
_NOT_FOR_WORKERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]

Job = Any  # what a batch is made from; must be picklable
Make = Callable[[Job], Any]
# Called on each death, with the job in progress and the exit code. If it raises, no new worker is started.
Died = Callable[[Job, int], None]


class _DeadError(Exception):
    """The error for a worker that has died."""


@dataclass(frozen=True)
class _Fault:
    """An error message that a worker returns instead of raising, without its traceback."""

    sentence: str


class Workers(Iterator[Any]):
    """The result of `make` for each job, in the order of the jobs.

    When a worker of torch's DataLoader dies, the main process raises wherever it happens to be, even in the middle of
    an update, and the batches in progress are lost. Here, a death is noticed only when a missing batch is asked for,
    and new workers make the missing batches.
    """

    def __init__(self, make: Make, jobs: Iterable[Job], num_workers: int, died: Died) -> None:
        self._make, self._jobs, self._died = make, iter(jobs), died
        self._dealt = self._taken = 0
        self._workers: list[_Worker] = []
        # Called when this object is deleted, or at exit, before multiprocessing waits for its children.
        self.end = Finalize(self, _end, (self._workers,), exitpriority=0)
        try:
            for place in range(num_workers):
                self._workers.append(_Worker(make, place, num_workers))
        except BaseException:
            self.end()  # ends the workers that did start
            raise

    def __next__(self) -> Any:
        """Return the next result. Raise DataError if `make` failed, or if the result cannot be sent."""
        self._deal()
        if self._taken == self._dealt:
            raise StopIteration
        made = self._received(self._taken % len(self._workers))
        self._taken += 1
        self._deal()
        if isinstance(made, _Fault):
            raise DataError(made.sentence)
        return made

    def _deal(self) -> None:
        """Give jobs to the workers in turn, so that their order alone shows which worker has the next batch."""
        while self._dealt - self._taken < _AHEAD * len(self._workers):
            try:
                job = next(self._jobs)
            except StopIteration:
                return
            self._workers[self._dealt % len(self._workers)].give(job)
            self._dealt += 1

    def _received(self, place: int) -> Any:
        while True:
            worker = self._workers[place]
            with suppress(_DeadError):
                return worker.take()
            self._replace_the_dead(worker)

    def _replace_the_dead(self, first: "_Worker") -> None:
        """Replace all dead workers, but report one death: the same cause often kills several at once."""
        self._died(first.given[0], first.process.exitcode or 0)
        for place, worker in enumerate(self._workers):
            if worker.process.exitcode is not None:
                worker.end()
                # One job at a time: if a batch kills its worker again, all batches before it were delivered.
                self._workers[place] = _Worker(self._make, place, len(self._workers), ahead=1)
                for job in worker.given:
                    self._workers[place].give(job)


class _Worker:
    """A worker process, its pipes, and its jobs whose results were not taken yet."""

    def __init__(self, make: Make, place: int, num_workers: int, ahead: int = _AHEAD) -> None:
        """Args:
        ahead: the most jobs to send to it at once; others wait in the main process.
        """
        self._ahead, self._n_sent = ahead, 0
        jobs, self._jobs = _PROCESSES.Pipe(duplex=False)
        self._results, results = _PROCESSES.Pipe(duplex=False)
        self.given: deque[Job] = deque()
        self.process = _PROCESSES.Process(
            target=_work, args=(make, jobs, results), kwargs={"id": place, "num_workers": num_workers}, daemon=True
        )
        try:
            self.process.start()
        except OSError as error:
            raise DataError(
                f"A worker cannot be started: {error}. If memory or the number of allowed processes ran out, lower "
                "`num_workers`."
            ) from error
        jobs.close()
        results.close()  # from now on, the pipe breaks as soon as the process ends

    def give(self, job: Job) -> None:
        self.given.append(job)
        self._send()

    def take(self) -> Any:
        """Return the result of the oldest job. Raise _DeadError if the worker died before it sent it."""
        try:
            made = self._results.recv()
        except Exception as error:  # its type depends on how much of a tensor had arrived when the pipe broke
            self.process.join(_DYING)
            if self.process.exitcode is not None:
                raise _DeadError from error
            raise DataError(
                f"A batch cannot be received from the worker that made it: {error!r}. If there are too many open "
                "files, raise the limit (`ulimit -n`). `num_workers=0` makes batches in the main process."
            ) from error
        self.given.popleft()
        self._n_sent -= 1
        self._send()
        return made

    def _send(self) -> None:
        while self._n_sent < min(self._ahead, len(self.given)):
            with suppress(BrokenPipeError):  # it is dead, which `take` will notice
                self._jobs.send(self.given[self._n_sent])
            self._n_sent += 1

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self._jobs.close()
        self._results.close()


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.end()


def _work(make: Make, jobs: connection.Connection, results: connection.Connection, **place: int) -> None:
    """Make batches, until the process is killed."""
    for number in _NOT_FOR_WORKERS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    info: dict[str, Any] = {**place, "seed": torch.initial_seed() + place["id"], "dataset": make}
    _of_torch._worker_info = _of_torch.WorkerInfo(**info)  # what `get_worker_info` returns to a data set
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(jobs, todo), daemon=True).start()
    while True:
        made = _made(make, todo.get())
        try:
            results.send(made)
        except Exception as error:
            results.send(
                _Fault(
                    f"A batch cannot be sent by the worker that made it: {error!r}. If shared memory (/dev/shm) ran "
                    "out, enlarge it or lower `num_workers`. If the batch holds objects that cannot be pickled, have "
                    "`data_collator` leave them out, or give `num_workers=0`."
                )
            )


def _receive(jobs: connection.Connection, todo: "queue.SimpleQueue[Job]") -> None:
    """Receive jobs at once, so that sending a job never blocks, even while this worker waits to send a result."""
    parent = parent_process()
    assert parent is not None, "workers are started by a process"
    with suppress(EOFError):
        while parent.sentinel not in connection.wait([jobs, parent.sentinel]):
            todo.put(jobs.recv())
    os._exit(0)  # the main process is gone


def _made(make: Make, job: Job) -> Any:
    try:
        return make(job)
    except DataError as error:
        return _Fault(str(error))
    except Exception as error:
        return _Fault(f"A batch cannot be made: {error!r}.")


def how_it_ended(exit_code: int) -> str:
    """Return how a process ended, such as "was killed by SIGKILL"."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"was killed by signal {-exit_code}"
