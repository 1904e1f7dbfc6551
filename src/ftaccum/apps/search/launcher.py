"""Several workers on one machine: processes of their own, each with its share of the processors, or a GPU."""

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

import dill
import optuna
import psutil
import torch
from optuna import Study

from ...errors import DataError, SettingsError
from ...runtime.signals import StopSignals
from .definition import Search
from .opening import open_study
from .processes import open_trial_processes
from .retry import IF_INTERRUPTED, counts
from .samplers import SeededByTrial
from .worker import TrialRunner

_POLL = 0.5  # seconds between two looks at the study
_PATIENCE = 60  # seconds that workers have to end when they are told to
_INTERRUPTED = 130
_LAST_WORDS = 20  # lines of a worker's log that are shown where it failed


def run_workers(search: Search, stop_signals: StopSignals, study: Study, on_trial: Callable[[], None]) -> None:
    """Has `n_workers` processes run trials until there are enough.

    Raises:
        SettingsError, DataError: as a worker met them.
        RuntimeError: where all workers ended before there were enough trials.
    """
    n_workers = search.settings.n_workers
    alone = replace(search, settings=replace(search.settings, n_workers=1, refit=False), progress=False)
    with tempfile.TemporaryDirectory() as scratch:
        logs = [(search.folder or Path(scratch)) / f"worker-{number + 1}.log" for number in range(n_workers)]
        with _started(alone, Path(scratch), logs) as workers:
            while any(worker.poll() is None for worker in workers):
                stop_signals.check()
                on_trial()
                time.sleep(_POLL)
            on_trial()
        ended = sum(map(counts, study.get_trials(deepcopy=False)))
        if ended >= search.settings.n_trials:
            return
        for error in Path(scratch).glob("error-*"):
            raise dill.loads(error.read_bytes())
        if any(worker.returncode for worker in workers):
            failed = next(n for n, worker in enumerate(workers) if worker.returncode)
            words = "\n".join(logs[failed].read_text(errors="replace").splitlines()[-_LAST_WORDS:])
            raise RuntimeError(
                f"All workers have ended, after {ended} of {search.settings.n_trials} trials. Starting again goes on "
                f"there. Worker {failed + 1} ended with status {workers[failed].returncode}, saying:\n{words}"
            )


@contextmanager
def _started(search: Search, scratch: Path, logs: list[Path]) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Workers that are running. However it is left, none of them is running any more afterwards."""
    try:
        # By value, so that functions of a script or a notebook get there, too.
        (scratch / "search").write_bytes(dill.dumps((sys.path, dill.dumps(search, recurse=True))))
    except Exception as error:
        raise SettingsError(
            [
                f"`n_workers` needs to send the search to other processes, and {error!r}. Define `model_factory` "
                "and the other functions so that they can be pickled, or start the program several times with one "
                "`storage`."
            ]
        ) from error
    workers = []
    try:
        for number, log in enumerate(logs):
            with log.open("wb") as file:
                command = [sys.executable, "-m", "ftaccum.apps.search", str(scratch), str(number), str(os.getpid())]
                environment = {**os.environ, **_share(number, len(logs))}
                workers.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment))
        yield workers
    finally:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                worker.terminate()  # they hand back what they were running
        try:
            for worker in workers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.wait(_PATIENCE)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()


def _share(number: int, n_workers: int) -> dict[str, str]:
    """A worker's part of the machine, in environment variables: threads, and where there are GPUs, one of them."""
    share = {"TOKENIZERS_PARALLELISM": "false"}
    if "OMP_NUM_THREADS" not in os.environ:
        share["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // n_workers))
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(
            ","
        )
        share["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)]
    return share


def be_worker(scratch: Path, number: int, parent: int) -> None:
    """What such a process does, for as long as the one that started it is there."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sys.path[:], pickled = dill.loads((scratch / "search").read_bytes())
    search: Search = dill.loads(pickled)
    study, storage = open_study(search, num_processes=1)
    if number and not isinstance(study.sampler, SeededByTrial):
        study.sampler.reseed_rng()  # all workers have been sent the same one
    stop_signals = StopSignals(IF_INTERRUPTED)
    with stop_signals.kept(), open_trial_processes() as processes:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
        try:
            TrialRunner(search, processes, stop_signals, study, storage).work(lambda: None)
        except (SettingsError, DataError) as error:
            (scratch / f"error-{number}").write_bytes(dill.dumps(error))
            raise
        except KeyboardInterrupt:
            sys.exit(_INTERRUPTED)


def _end_with(parent: int) -> None:
    """Ends this process when the one that started it is gone: at once, as if it had been killed as well."""
    while os.getppid() == parent and psutil.pid_exists(parent):  # the first says nothing on Windows
        time.sleep(1)
    os._exit(_INTERRUPTED)
