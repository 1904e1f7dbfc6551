"""Write files so that the old ones survive a kill or a full disk in the middle."""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Some network and user-space file systems do not support flushing. Their files are valid all the same.
_CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP)

_AT_WORKING_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <fcntl.h> and <linux/fs.h>


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file that replaces `path` only when it is complete and on the disk.

    If writing fails, `path` stays as it was and the unfinished file is removed. If the process is killed, the next one
    that writes to `path` removes the unfinished file. Only one process may write to `path` at a time.

    Yields:
        the path to write to, in the same folder, which is created if it is missing. No file is there yet.

    Raises:
        OSError: if writing, flushing or renaming fails.
    """
    with _partial(path) as (partial, target):
        yield partial
        fsync_path(partial)
        os.replace(partial, target)
        fsync_path(target.parent)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Write a folder that replaces the one at `path` and all its files, as `atomic_write` does for a file.

    Linux exchanges the two folders in one step. On other systems, and on file systems without this, a kill between two
    renames leaves nothing at `path`. Then the old folder is at `.<name>.replaced` and the new one at `.<name>.partial`,
    both complete.

    Yields:
        an empty folder to write into.

    Raises:
        OSError: if writing, flushing or renaming fails.
    """
    with _partial(path) as (partial, target):
        partial.mkdir()
        yield partial
        for folder, _, names in os.walk(partial, topdown=False):
            for name in names:
                fsync_path(Path(folder, name))
            fsync_path(Path(folder))
        if not (target.exists() and _exchanged(partial, target)):
            _put_in_place(partial, target)
        fsync_path(target.parent)


class AppendOnlyFile:
    """A file of lines that grows from time to time.

    The object remembers how much it has written successfully. It cuts off a partial line. If writing failed or the file
    was removed, the next `write` adds all missing lines.
    """

    def __init__(self, path: Path) -> None:
        """Create the file, or empty it.

        Raises:
            OSError: if that fails.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        self.path, self.n_lines = path, 0
        self._size = 0

    def write(self, lines: Callable[[int], Iterable[str]]) -> None:
        """Append the lines that are not in the file yet.

        Args:
            lines: returns the lines from the n-th on, counted from 0, without line ends.

        Raises:
            OSError: if writing fails. The next call asks for the same lines again.
        """
        try:
            self._append(lines)
        except OSError:
            with suppress(OSError):  # if this fails, the next call truncates the file
                os.truncate(self.path, self._size)
            raise

    def _append(self, lines: Callable[[int], Iterable[str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if file.tell() < self._size:  # another file than the one written so far
                self.n_lines = self._size = 0
            file.truncate(self._size)
            for line in lines(self.n_lines):
                encoded = f"{line}\n".encode()
                file.write(encoded)
                file.flush()
                self.n_lines += 1
                self._size += len(encoded)


def fsync_path(path: str | Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _partial(path: str | Path) -> Iterator[tuple[Path, Path]]:
    """Yield a temporary path in the same folder, unused before and after, and `path` with links resolved."""
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    _remove(partial)
    try:
        yield partial, target
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two paths in one step, and return whether that was possible."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old one
        return False
    return bool(rename(_AT_WORKING_FOLDER, os.fsencode(one), _AT_WORKING_FOLDER, os.fsencode(other), _EXCHANGE) == 0)


def _put_in_place(partial: Path, target: Path) -> None:
    replaced = target.with_name(f".{target.name}.replaced")
    _remove(replaced)
    with suppress(FileNotFoundError):
        target.rename(replaced)
    try:
        partial.rename(target)
    except OSError:
        with suppress(FileNotFoundError):
            replaced.rename(target)
        raise
    _remove(replaced)
