"""Whether the worker that runs a trial is still there: for workers on one machine, seen at once."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

_CLOCK = 60.0  # seconds that a clock may be set by while a process runs


def here() -> dict[str, Any]:
    """This process, as it can be found again."""
    return {"machine": _machine(), "process": os.getpid(), "started": psutil.Process().create_time()}


def is_gone(worker: Mapping[str, Any] | None) -> bool | None:
    """Whether a worker that ran on this machine is not there any more; None for one elsewhere, of which nothing is
    known."""
    if not worker or worker["machine"] != _machine():
        return None
    try:
        process = psutil.Process(worker["process"])
        # A number is given out again, and one that ended is listed until somebody asks how.
        another = abs(process.create_time() - worker["started"]) > _CLOCK
        return another or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _machine() -> str:
    """This machine since it was started, and among whose processes: a container's have numbers of their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return platform.node()
