"""Measure the peak memory and the time of a function, in a process of its own.

    peak = peak_memory(train, 20, 1)      # MB that train(20, 1) needs beyond the imports

The function may be defined in a notebook. It travels to the new process with the globals that it uses, so tensors among
these are there before the measurement starts. The process is new because the peak of a process never falls: a second
measurement in the same process would show the larger of the two.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dill

MB = 1e6
# Return freed blocks from 64 KB on to the system at once. By default, malloc keeps some of them, and how many depends on
# the order of calls.
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


def measure(function: Callable[..., Any], *arguments: Any, warm_up: tuple[Any, ...] | None = None) -> Measurement:
    """Run `function(*arguments)` in a new process with one thread, and measure it.

    Args:
        function: a function of a module or of a notebook. Its result must be picklable.
        warm_up: arguments of a run before the measured one, a small one. It loads the libraries that PyTorch loads at
            first use, so that they do not count.

    Raises:
        RuntimeError: if the process fails, with the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        task, answer = Path(folder) / "task", Path(folder) / "answer"
        task.write_bytes(dill.dumps((function, arguments, warm_up), recurse=True))
        environment = {**os.environ, **_MALLOC, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, str(task), str(answer)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode != 0:
            name = getattr(function, "__name__", function)
            raise RuntimeError(f"The process that measured `{name}` failed: {run.stderr.strip()[-2000:]}")
        found: Measurement = Measurement(*dill.loads(answer.read_bytes()))
        return found


def peak_memory(function: Callable[..., Any], *arguments: Any, warm_up: tuple[Any, ...] | None = None) -> float:
    """Return the peak memory of `function(*arguments)` in MB, as `measure` does."""
    return measure(function, *arguments, warm_up=warm_up).peak_mb


def high_water_mark() -> int:
    """Return the most bytes that this process has had in memory so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux, ru_maxrss of a new process starts at the peak of the process that started it: a child of a process
        # of 300 MB reports 300 MB. VmHWM starts with the program.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def _answer(task: Path, answer: Path) -> None:
    """Run a task in this process, and write its measurement."""
    import torch

    torch.set_num_threads(1)
    function, arguments, warm_up = dill.loads(task.read_bytes())
    if warm_up is not None:
        function(*warm_up)
    before, started = high_water_mark(), time.perf_counter()
    result = function(*arguments)
    seconds = time.perf_counter() - started
    answer.write_bytes(dill.dumps(((high_water_mark() - before) / MB, seconds, result)))


if __name__ == "__main__":
    _answer(Path(sys.argv[1]), Path(sys.argv[2]))
