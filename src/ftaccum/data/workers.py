"""Processes that make batches before they are asked for, and whose deaths lose none."""

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

# Forked workers find rows and collators in memory, lambdas and all; elsewhere these must be picklable.
_PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
_AHEAD = 16  # batches that each worker may have made before they are asked for
_DYING = 5  # seconds that a process has to be gone, after its pipe broke
# A scheduler may send these to every process of a run. The run ends when it sees fit, and its workers with it.
_NOT_FOR_WORKERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]

Job = Any  # what a batch is made from; it can be pickled
Make = Callable[[Job], Any]
# Told of each death: what was being made, and the exit code. It may raise, and no new worker is started.
Died = Callable[[Job, int], None]


class _DeadError(Exception):
    """A worker is gone."""


@dataclass(frozen=True)
class _Fault:
    """What a worker hands back instead of raising: the sentence, without the worker's traceback around it."""

    sentence: str


class Workers(Iterator[Any]):
    """What `make` makes of each job, in the order of the jobs.

    torch's DataLoader would do, but that it raises wherever the main process happens to be when a worker dies, be it in
    the middle of an update, and that the batches which were on their way are lost. Here, a death shows when a batch is
    asked for that it leaves missing, and new workers make what is missing.
    """

    def __init__(self, make: Make, jobs: Iterable[Job], num_workers: int, died: Died) -> None:
        self._make, self._jobs, self._died = make, iter(jobs), died
        self._dealt = self._taken = 0
        self._workers: list[_Worker] = []
        # When nobody refers to it any more, and before multiprocessing waits for its children at exit.
        self.end = Finalize(self, _end, (self._workers,), exitpriority=0)
        try:
            for place in range(num_workers):
                self._workers.append(_Worker(make, place, num_workers))
        except BaseException:
            self.end()  # those that were started; nobody else knows of them
            raise

    def __next__(self) -> Any:
        """Raises DataError where `make` does, and where a batch cannot be sent."""
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
        """Jobs are dealt by turns, so that who has the next batch needs no telling."""
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
        """All at once: what kills one often kills others with it, and that is one death to be told of."""
        self._died(first.given[0], first.process.exitcode or 0)
        for place, worker in enumerate(self._workers):
            if worker.process.exitcode is not None:
                worker.end()
                # One at a time, so that if a batch kills whoever makes it, those before it are in use by then.
                self._workers[place] = _Worker(self._make, place, len(self._workers), ahead=1)
                for job in worker.given:
                    self._workers[place].give(job)


class _Worker:
    """A process, its pipes, and the jobs that it was given and has not been relieved of."""

    def __init__(self, make: Make, place: int, num_workers: int, ahead: int = _AHEAD) -> None:
        """Args:
        ahead: jobs that it may have at once; others wait here.
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
                f"A worker cannot be started: {error}. Where memory ran out, or there may be no more processes, lower "
                "`num_workers`."
            ) from error
        jobs.close()
        results.close()  # from now on the pipe is broken as soon as the process is gone

    def give(self, job: Job) -> None:
        self.given.append(job)
        self._send()

    def take(self) -> Any:
        """The result of the job that was given first. Raises _DeadError where it is not going to come."""
        try:
            made = self._results.recv()
        except Exception as error:  # what a broken pipe leads to depends on how far a tensor had come through it
            self.process.join(_DYING)
            if self.process.exitcode is not None:
                raise _DeadError from error
            raise DataError(
                f"A batch cannot be taken from the worker that made it: {error!r}. `num_workers=0` makes batches "
                "without other processes; for more open files, see `ulimit -n`."
            ) from error
        self.given.popleft()
        self._n_sent -= 1
        self._send()
        return made

    def _send(self) -> None:
        while self._n_sent < min(self._ahead, len(self.given)):
            with suppress(BrokenPipeError):  # it is dead, which shows when its results are asked for
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
    """What a worker does until it is killed."""
    for number in _NOT_FOR_WORKERS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    told: dict[str, Any] = {**place, "seed": torch.initial_seed() + place["id"], "dataset": make}
    _of_torch._worker_info = _of_torch.WorkerInfo(**told)  # what a data set asks `get_worker_info` for
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(jobs, todo), daemon=True).start()
    while True:
        made = _made(make, todo.get())
        try:
            results.send(made)
        except Exception as error:
            results.send(
                _Fault(
                    f"A batch cannot be sent by the worker that made it: {error!r}. Where shared memory (/dev/shm) ran "
                    "out, have it enlarged, or lower `num_workers`; where the batch holds what cannot be pickled, have "
                    "`data_collator` leave it out, or give `num_workers=0`."
                )
            )


def _receive(jobs: connection.Connection, todo: "queue.SimpleQueue[Job]") -> None:
    """Takes jobs at once, so that who gives them never waits for who waits for a result to be taken."""
    parent = parent_process()
    assert parent is not None, "workers are started by a process"
    with suppress(EOFError):
        while parent.sentinel not in connection.wait([jobs, parent.sentinel]):
            todo.put(jobs.recv())
    os._exit(0)  # nobody is left to make anything for


def _made(make: Make, job: Job) -> Any:
    try:
        return make(job)
    except DataError as error:
        return _Fault(str(error))
    except Exception as error:
        return _Fault(f"A batch cannot be made: {error!r}.")


def how_it_ended(exit_code: int) -> str:
    """A process's end in words: "was killed by SIGKILL"."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"was killed by signal {-exit_code}"
