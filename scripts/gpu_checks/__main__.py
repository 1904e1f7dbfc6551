"""Check the GPUs of this machine, and print a report.

The parts are exactness, memory and speed, memory habits, losses of many labels and resuming.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import report
from .estimates import estimates_of
from .job import EACH, MID, ONE_COPY, TINY, WHOLE, Job, accelerator
from .launch import PartError, run
from .machine import describe_machine
from .resume import resume_check

_LEAST = 10.0  # seconds that a part needs at all


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        share: its share of the time, relative to the other parts.
        check: runs it within the seconds given, and returns its numbers.
        describe: returns them as text.
    """

    name: str
    share: float
    check: Callable[[float], dict[str, Any]]
    describe: Callable[[dict[str, Any]], str]


def parts_of(model: str, num_processes: int, folder: Path) -> list[Part]:
    """Return the parts to run on this machine."""

    def exactness(seconds: float) -> dict[str, Any]:
        found = run(Job("exactness", str(folder / "exactness"), num_processes, seconds=seconds))
        return {"errors": _largest([each["errors"] for each in found]), "windows": found[0]["windows"]}

    def speed(seconds: float) -> dict[str, Any]:
        rows, length = (4, 512) if accelerator() is not None else (2, 32)
        place = str(folder / "speed")
        job = Job("memory and speed", place, num_processes, model, batch_size=rows, length=length, seconds=seconds)
        found = run(job)
        memory = _largest([each["memory"] for each in found])
        return found[0] | {"memory": memory, "estimates": estimates_of(job, found[0]["autocast"]), "model": model}

    def habits(seconds: float) -> dict[str, Any]:
        return run(Job("memory habits", str(folder / "habits"), 1, seconds=seconds))[0]

    def head_losses(seconds: float) -> dict[str, Any]:
        return run(Job("head losses", str(folder / "head losses"), 1, seconds=seconds))[0]

    def resuming(way: str) -> Part:
        place = folder / f"resume {way}"
        place.mkdir()
        return Part(f"resume, {way}", 0.25, lambda s: resume_check(place, way, num_processes, s), report.resume)

    ways = [WHOLE, EACH] if num_processes > 1 else [ONE_COPY]
    return [
        Part("exactness (tiny model)", 0.3, exactness, report.exactness),
        Part("memory and speed", 0.25, speed, report.memory_and_speed),
        Part("memory habits", 0.1, habits, report.habits),
        Part("losses of many labels, bf16", 0.05, head_losses, report.head_losses),
        *map(resuming, ways),
    ]


def run_parts(parts: Sequence[Part], seconds: float, show: Callable[[str], None]) -> dict[str, Any]:
    """Run parts within a time limit. A part that fails is reported, and the others go on."""
    found, deadline = {}, time.monotonic() + seconds
    for n, part in enumerate(parts):
        left = deadline - time.monotonic()
        budget = left * part.share / sum(each.share for each in parts[n:])
        show(f"\n== {part.name} (at most {budget:.0f} s)")
        started = time.monotonic()
        try:
            if budget < _LEAST:
                raise PartError(f"skipped, because only {budget:.0f} s are left for it. Raise `--minutes`")
            found[part.name] = part.check(budget)
            show(part.describe(found[part.name]))
        except Exception as error:  # whatever a part raises, the others go on
            reason = str(error) if isinstance(error, PartError) else f"{type(error).__name__}: {error}"
            found[part.name] = {"failed": reason}
            show(f"FAILED: {reason}")
        found[part.name]["duration"] = round(time.monotonic() - started, 1)
        show(f"({found[part.name]['duration']} s)")
    return found


def _largest(of_processes: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the largest of each number over all processes; None where there is none."""
    first = of_processes[0]
    return {
        outer: {
            inner: max((v for v in (each[outer][inner] for each in of_processes) if v is not None), default=None)
            for inner in first[outer]
        }
        for outer in first
    }


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("scripts/gpu_check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="real causal language model for memory and speed: a folder or hub name")
    parser.add_argument("--minutes", type=float, default=10.0, help="time limit of all parts together (10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file as well")
    options = parser.parse_args(words)
    if not options.minutes > 0:
        parser.error(f"--minutes must be a positive number, but is {options.minutes:g} instead.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes of a part are killed as well
    os.environ.setdefault("HF_HUB_OFFLINE", "0" if options.model else "1")
    n_gpus = torch.accelerator.device_count() if accelerator() is not None else 0
    num_processes = n_gpus or 2
    machine = describe_machine()
    print(report.header(machine, num_processes), flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        parts = parts_of(options.model or (MID if n_gpus else TINY), num_processes, Path(folder))
        found = run_parts(parts, 60 * options.minutes, lambda text: print(text, flush=True))
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine, "processes": num_processes, "parts": found}, indent=2))
    return int(any("failed" in part for part in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
