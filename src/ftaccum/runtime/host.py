"""The memory and CPUs that this process may use, within the limits of its containers."""

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
    """The files in which one kind of control group keeps its numbers.

    Attributes:
        limits: files with a limit.
        used: the file with the bytes in use.
        cache: the entry of `memory.stat` for cached files, in bytes. The kernel drops these when it needs memory.
    """

    limits: tuple[str, ...]
    used: str
    cache: str


_MEMORY_FILES = {  # by file system; version 1 includes nested groups only in entries with other names
    "cgroup2": _MemoryFiles(("memory.max", "memory.high"), "memory.current", "inactive_file"),
    "cgroup": _MemoryFiles(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}


def free_on_host(proc: Path = Path("/proc/self")) -> int:
    """Return the free bytes of the machine or of a control group (container) around the process, whichever is less.

    Args:
        proc: the folder in which the kernel describes the process.
    """
    free: list[float] = [psutil.virtual_memory().available]
    with suppress(OSError):  # a system without control groups
        free += [_free_in(group, files) for group, files in _memory_groups(proc)]
    return int(max(0, min(free)))


def free_per_process() -> int:
    """Return this process's share of the free bytes, if all processes of the launcher on this machine share equally."""
    return free_on_host() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_of_process() -> int:
    """Return the peak memory of this process so far, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset  # type: ignore[attr-defined]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def usable_cpus() -> int:
    """Return the number of CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_groups(proc: Path) -> Iterator[tuple[Path, _MemoryFiles]]:
    """Yield the folders of the control groups that limit the process's memory, the innermost first."""
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
            group = mount if below.startswith("..") else mount / below  # a container may not see its own group's path
            for folder in (group, *group.parents):
                yield folder, _MEMORY_FILES[file_system]
                if folder == mount:
                    break


def _free_in(group: Path, files: _MemoryFiles) -> float:
    """Return the bytes that the processes of a group can still use; infinity if it has no limit."""
    limit = min(_number(group / name, math.inf) for name in files.limits)
    cache = 0
    with suppress(OSError):
        cache = int(dict(line.split() for line in (group / "memory.stat").read_text().splitlines()).get(files.cache, 0))
    return limit - _number(group / files.used, 0) + cache


def _number(file: Path, default: float) -> float:
    """Return the number in a file, or the default if the file is missing or contains "max"."""
    with suppress(OSError, ValueError):
        return int(file.read_text())
    return default
