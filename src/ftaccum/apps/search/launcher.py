"""Launch several workers on one machine. Each is a process with a share of the processors, or with one GPU."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import dill
import optuna
import psutil
import torch
from optuna import Study

from ...errors import DataError, SettingsError
from ...runtime.host import usable_cpus
from ...runtime.signals import StopSignals
from ..exit_status import INTERRUPTED
from .definition import Search
from .processes import open_trial_processes
from .retry import n_counted
from .samplers import SeededByTrial
from .study import open_study
from .worker import ON_INTERRUPT, TrialExecutor, Worker

_POLL = 0.5  # seconds between checks of the study
_PATIENCE = 60  # seconds that workers have to end after SIGTERM
_LOG_LINES = 20  # lines of a failed worker's log to show


def run_workers(search: Search, stop_signals: StopSignals, study: Study, on_trial: Callable[[], None]) -> None:
    """Run trials in `n_workers` processes until the study has enough.

    Args:
        search: the search.
        stop_signals: signals that end the workers.
        study: the study that the workers share.
        on_trial: called whenever trials may have ended.

    Raises:
        SettingsError, DataError: if a worker raised it before the study had enough trials.
        RuntimeError: if all workers ended before the study had enough trials, and one of them failed.
    """
    settings = search.settings
    single = replace(search, settings=replace(settings, n_workers=1, refit=False), progress=False)
    with tempfile.TemporaryDirectory() as scratch:
        logs = [(search.folder or Path(scratch)) / f"worker-{n + 1}.log" for n in range(settings.n_workers)]
        with _start_workers(single, Path(scratch), logs) as workers:
            while any(worker.poll() is None for worker in workers):
                stop_signals.check()
                on_trial()
                time.sleep(_POLL)
            on_trial()
        ended = n_counted(study)
        if ended >= settings.n_trials:
            return
        for error in Path(scratch).glob("error-*"):
            raise dill.loads(error.read_bytes())
        failed = next((n for n, worker in enumerate(workers) if worker.returncode), None)
        if failed is not None:
            lines = "\n".join(logs[failed].read_text(errors="replace").splitlines()[-_LOG_LINES:])
            raise RuntimeError(
                f"All workers ended after {ended} of {settings.n_trials} trials. Run the same search again to resume. "
                f"Worker {failed + 1} ended with status {workers[failed].returncode}. The end of its log:\n{lines}"
            )


@contextmanager
def _start_workers(search: Search, scratch: Path, logs: list[Path]) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Start workers. On exit, end those that are still running."""
    try:
        # Pickle by value, so that functions of a script or a notebook can be sent, too.
        (scratch / "search").write_bytes(dill.dumps((sys.path, dill.dumps(search, recurse=True))))
    except Exception as error:
        named = {"model_factory": search.model_factory, **search.fixed, "space": search.space}
        faulty = ", ".join(f"`{name}`" for name, value in named.items() if not _can_be_pickled(value))
        raise SettingsError(
            [
                f"`n_workers` sends the search to other processes, but pickling {faulty or 'it'} raised {error!r}. "
                "Define functions and objects so that they can be pickled, or start the program several times with the "
                "same `storage`."
            ]
        ) from error
    workers = []
    try:
        for number, log in enumerate(logs):
            with log.open("wb") as file:
                command = [sys.executable, "-m", "ftaccum.apps.search", str(scratch), str(number), str(os.getpid())]
                environment = {**os.environ, **_share_of_machine(number, len(logs))}
                workers.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment))
        yield workers
    finally:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                worker.terminate()  # workers queue their trials again
        try:
            for worker in workers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.wait(_PATIENCE)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()


def _can_be_pickled(value: Any) -> bool:
    try:
        dill.dumps(value, recurse=True)
    except Exception:
        return False
    return True


def _share_of_machine(number: int, n_workers: int) -> dict[str, str]:
    """Return the environment variables that give a worker its share of the threads, and one of the GPUs, if any."""
    share = {"TOKENIZERS_PARALLELISM": "false"}
    if "OMP_NUM_THREADS" not in os.environ:
        share["OMP_NUM_THREADS"] = str(max(1, usable_cpus() // n_workers))
    if torch.cuda.is_available():
        every_gpu = ",".join(map(str, range(torch.cuda.device_count())))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", every_gpu).split(",")
        share["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)]
    return share


def run_worker(scratch: Path, number: int, parent: int) -> None:
    """Run trials in a worker's process, as long as its parent lives.

    Args:
        scratch: folder that holds the search, and receives an error for the parent to raise.
        number: index of this worker, from 0.
        parent: id of the process that started this worker.
    """
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sys.path[:], pickled = dill.loads((scratch / "search").read_bytes())
    search: Search = dill.loads(pickled)
    study, storage = open_study(search, num_processes=1)
    if number and not isinstance(study.sampler, SeededByTrial):
        study.sampler.reseed_rng()  # all workers received the same sampler
    stop_signals = StopSignals(ON_INTERRUPT)
    with stop_signals.kept(), open_trial_processes() as processes:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # terminals send it to all; the parent decides
        try:
            Worker(TrialExecutor(search, processes, stop_signals), study, storage).work(lambda: None)
        except (SettingsError, DataError) as error:
            (scratch / f"error-{number}").write_bytes(dill.dumps(error))
            raise
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, without cleaning up, as if it had been killed as well."""
    while os.getppid() == parent and psutil.pid_exists(parent):  # on Windows, `getppid` never changes
        time.sleep(1)
    os._exit(INTERRUPTED)
