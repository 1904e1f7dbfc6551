"""The memory and the processors that this process may use, within the containers around it."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class _MemoryFiles:
    """Where a kind of control group keeps its figures.

    Attributes:
        limits: files with a limit.
        used: the file with the bytes in use.
        cache: the entry of `memory.stat` with the bytes of cached files that the kernel drops when it needs memory.
    """

    limits: tuple[str, ...]
    used: str
    cache: str


_MEMORY_FILES = {  # by file system; those of version 1 count the groups below only under other names
    "cgroup2": _MemoryFiles(("memory.max", "memory.high"), "memory.current", "inactive_file"),
    "cgroup": _MemoryFiles(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}


def free_on_host(proc: Path = Path("/proc/self")) -> int:
    """Return the bytes that are free on the machine and in all control groups (containers) around the process.

    Args:
        proc: where the kernel describes the process.
    """
    free: list[float] = [psutil.virtual_memory().available]
    with suppress(OSError):  # a system without control groups
        free += [_free_in(group, files) for group, files in _memory_groups(proc)]
    return int(max(0, min(free)))


def peak_of_process() -> int:
    """Return the most bytes that this process has had in memory so far."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset  # type: ignore[attr-defined]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def usable_cpus() -> int:
    """Return how many processors the process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_groups(proc: Path) -> Iterator[tuple[Path, _MemoryFiles]]:
    """Yield the folders of the groups that limit the process's memory, from the innermost outwards."""
    paths = {}
    for line in (proc / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    for line in (proc / "mountinfo").read_text().splitlines():
        here, _, there = line.partition(" - ")
        root, mount_point = here.split()[3:5]
        file_system, _, options = there.split(" ", 2)
        if file_system in paths and (file_system == "cgroup2" or "memory" in options.split(",")):
            mount = Path(mount_point)
            below = os.path.relpath(paths[file_system], root)
            group = mount if below.startswith("..") else mount / below  # a container may not see its own group's name
            for folder in (group, *group.parents):
                yield folder, _MEMORY_FILES[file_system]
                if folder == mount:
                    break


def _free_in(group: Path, files: _MemoryFiles) -> float:
    """Return the bytes that a group leaves its processes; infinity where it has no limit."""
    limit = min(_number(group / name, math.inf) for name in files.limits)
    cache = 0
    with suppress(OSError):
        cache = int(dict(line.split() for line in (group / "memory.stat").read_text().splitlines()).get(files.cache, 0))
    return limit - _number(group / files.used, 0) + cache


def _number(file: Path, default: float) -> float:
    """Return the number in a file; the default where there is none, or it says "max"."""
    with suppress(OSError, ValueError):
        return int(file.read_text())
    return default
