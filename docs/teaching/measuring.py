"""Measure the peak memory and the time of a function, in a process of its own.

    peak = peak_memory(train, 20, 1)      # MB that train(20, 1) needs beyond the imports
    measure_each(train, [(20, 1), (10, 8)], warm_up=(1, 1))

The function may be defined in a notebook. It travels to the new process with the globals that it uses, so tensors among
these are there before the measurement starts. Each run has its own process because the peak of a process never falls: a
second run in the same process would show the larger of the two peaks.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dill

ROOT = Path(__file__).parents[2]
MB = 1e6
# Return freed blocks from 64 KB on to the system at once. By default, malloc keeps some of them: the peak of 8
# accumulated batches was then 19 MB instead of 10, and that of a single one 14.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Measurement:
    """One run of a function.

    Attributes:
        peak_mb: the most memory of the process beyond its memory at the start of the run, in MB.
        seconds: the time of the run.
        result: what the function returned.
    """

    peak_mb: float
    seconds: float
    result: Any


def measure_each(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], *, warm_up: tuple[Any, ...] | None = None
) -> list[Measurement]:
    """Run a function with each of several arguments, each time in a new process with one thread.

    Args:
        function: a function of a module or of a notebook. Its result must be picklable.
        calls: the arguments of each run.
        warm_up: arguments of a small run that each process makes before the measured one. It loads the libraries that
            PyTorch loads at first use, so that they do not count.

    Returns:
        The measurement of each run.

    Raises:
        RuntimeError: if a process fails, with the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "task").write_bytes(dill.dumps((function, list(calls), warm_up), recurse=True))
        path = os.pathsep.join(filter(None, sys.path))
        environment = {**os.environ, **_MALLOC, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        run = subprocess.run([sys.executable, __file__, folder], env=environment, capture_output=True, text=True)
        if run.returncode != 0:
            name = getattr(function, "__name__", function)
            raise RuntimeError(f"The process that measured `{name}` failed: {run.stderr.strip()[-2000:]}")
        return [Measurement(*dill.loads((Path(folder) / str(n)).read_bytes())) for n in range(len(calls))]


def measure(function: Callable[..., Any], *arguments: Any, warm_up: tuple[Any, ...] | None = None) -> Measurement:
    """Run `function(*arguments)` in a new process, as `measure_each` does."""
    return measure_each(function, [arguments], warm_up=warm_up)[0]


def peak_memory(function: Callable[..., Any], *arguments: Any, warm_up: tuple[Any, ...] | None = None) -> float:
    """Return the peak memory of `function(*arguments)` in MB, as `measure_each` does."""
    return measure(function, *arguments, warm_up=warm_up).peak_mb


def high_water_mark() -> int:
    """Return the most bytes that this process has had in memory so far.

    On Linux, the peak of a program starts at that of the process that started it: a child of a process of 300 MB has a
    peak of 300 MB at once. A process that was forked and starts no program does not inherit the peak.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _run_all(folder: Path) -> None:
    """Import what all runs share, and fork a process for each run."""
    function, calls, warm_up = dill.loads((folder / "task").read_bytes())
    for n, arguments in enumerate(calls):
        process = os.fork()
        if process == 0:
            _run(function, arguments, warm_up, folder / str(n))
            os._exit(0)
        _, status = os.waitpid(process, 0)
        if status != 0:
            sys.exit(f"the run with {arguments} ended with status {os.waitstatus_to_exitcode(status)}")


def _run(function: Callable[..., Any], arguments: tuple[Any, ...], warm_up: tuple[Any, ...] | None, to: Path) -> None:
    if warm_up is not None:
        function(*warm_up)
    before, started = high_water_mark(), time.perf_counter()
    result = function(*arguments)
    seconds = time.perf_counter() - started
    to.write_bytes(dill.dumps(((high_water_mark() - before) / MB, seconds, result)))


if __name__ == "__main__":
    _run_all(Path(sys.argv[1]))
