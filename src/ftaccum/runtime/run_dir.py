"""One run at a time in a folder."""

import contextlib
import errno
import importlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ..errors import CheckpointError

_fcntl: Any = None
with contextlib.suppress(ImportError):  # no Unix: nothing is locked
    _fcntl = importlib.import_module("fcntl")

_NAME = ".lock"


@contextmanager
def lock(output_dir: Path) -> Iterator[None]:
    """Keeps other processes' runs off a folder. Where the file system knows no locks, there is none.

    The lock is this process's alone (POSIX): workers that outlive it by some seconds hold none, and the system takes it
    from one that is killed.

    Raises:
        CheckpointError: where another process holds it.
    """
    file = _locked(output_dir / _NAME)
    try:
        yield
    finally:
        if file is not None:
            # First the name, as long as nobody else can hold it. Somebody who opened it before asks for it again.
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            file.close()


def is_locked(output_dir: Path) -> bool:
    """Whether another process's run is going on there."""
    try:
        with lock(output_dir):
            return False
    except CheckpointError:
        return True


def _locked(path: Path) -> TextIO | None:
    while _fcntl is not None:
        try:
            file = path.open("a+")
        except OSError:
            return None  # what cannot be written here is told by those who write it
        try:
            _fcntl.lockf(file, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise CheckpointError(
                    [
                        f"`output_dir` is {str(path.parent)!r}, in which another run is going on ({holder}), and two "
                        "would write over each other. Wait for its end, stop it, or name another folder."
                    ]
                ) from error
            return None
        if _leads_to(path, file):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        file.close()  # it was removed by the one that had it
    return None


def _leads_to(path: Path, file: TextIO) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    return False
