"""Run a command, and measure its time and the peak memory of all its processes."""

import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_INTERVAL = 0.1  # seconds between two looks at the processes
_SECONDS_TO_END = 10.0


@dataclass(frozen=True)
class Usage:
    """How a command ended, and what it used.

    Attributes:
        status: its exit status; negative: the number of the signal that ended it.
        seconds: wall-clock time.
        peak_memory: bytes of resident memory of its processes: the sum of their high-water marks, at the moment when
            this is greatest. Pages that processes share, such as the code of libraries, count for each of them.
    """

    status: int
    seconds: float
    peak_memory: int


def run_measured(words: Sequence[str], log: Path) -> Usage:
    """Run a command, with its output in a file, and measure it.

    If this is interrupted, the command and its processes end as well.
    """
    started, peak = time.perf_counter(), 0
    with log.open("wb") as output, subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            while process.poll() is None:
                peak = max(peak, sum(map(_high_water_mark, _tree(process.pid))))
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_INTERVAL)
        except BaseException:
            _end(_tree(process.pid))
            raise
    return Usage(process.returncode, time.perf_counter() - started, peak)


def _tree(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def _high_water_mark(process: psutil.Process) -> int:
    """Return the most bytes that a process has had so far; where the system does not record them, those it has now."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def _end(processes: Sequence[psutil.Process]) -> None:
    """End processes, by force if they do not obey."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, _SECONDS_TO_END)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
