"""Writing files so that a kill or a full disk in the middle leaves the old ones whole."""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Some network and user-space file systems cannot be told to flush, which makes nothing that they hold wrong.
_CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP)

_AT_WORKING_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <fcntl.h> and <linux/fs.h>


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Writes a file that takes the place of `path` once it is whole and on the disk.

    Where the writing fails, what is at `path` stays as it was and nothing is left beside it; what a killed process left
    is removed by the next one that writes to `path`. Only one may do so at a time.

    Yields:
        the path to write to, in the same folder, which is made where it is missing. Nothing lies there yet.

    Raises:
        OSError: what writing, flushing or renaming raised.
    """
    with _beside(path) as (beside, target):
        yield beside
        fsync_path(beside)
        os.replace(beside, target)
        fsync_path(target.parent)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """As `atomic_write`, for a folder with all that is in it: what lay in a folder at `path` before is gone afterwards.

    Linux exchanges the two folders in one step. Elsewhere, and on file systems that cannot, a kill between two renames
    leaves nothing at `path`, the old folder in `.<name>.replaced` and the new one in `.<name>.partial`, both whole.

    Yields:
        an empty folder to write into.

    Raises:
        OSError: what writing, flushing or renaming raised.
    """
    with _beside(path) as (beside, target):
        beside.mkdir()
        yield beside
        for folder, _, names in os.walk(beside, topdown=False):
            for name in names:
                fsync_path(Path(folder, name))
            fsync_path(Path(folder))
        if not (target.exists() and _exchanged(beside, target)):
            _put_in_place(beside, target)
        fsync_path(target.parent)


class AppendOnlyFile:
    """A file of lines, brought up to date from time to time.

    It is remembered how far it was written well. Half a line is cut off, and where writing failed, or the file was
    removed, the next time makes up for all that is missing.
    """

    def __init__(self, path: Path) -> None:
        """Empties the file, or makes it.

        Raises:
            OSError: where that cannot be done.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        self.path, self.n_lines = path, 0
        self._size = 0

    def write(self, lines: Callable[[int], Iterable[str]]) -> None:
        """Appends what is not there yet.

        Args:
            lines: gives the lines from the n-th on, counted from 0, without their ends.

        Raises:
            OSError: what writing raised. The lines will be asked for again.
        """
        try:
            self._append(lines)
        except OSError:
            with suppress(OSError):  # or else the next time
                os.truncate(self.path, self._size)
            raise

    def _append(self, lines: Callable[[int], Iterable[str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if file.tell() < self._size:  # not the file that was written to
                self.n_lines = self._size = 0
            file.truncate(self._size)
            for line in lines(self.n_lines):
                encoded = f"{line}\n".encode()
                file.write(encoded)
                file.flush()
                self.n_lines += 1
                self._size += len(encoded)


def fsync_path(path: str | Path) -> None:
    """Waits until a file, or the list of names of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _beside(path: str | Path) -> Iterator[tuple[Path, Path]]:
    """A path in the same folder, free before and after, and where `path` leads to, links followed."""
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.partial")
    _remove(beside)
    try:
        yield beside, target
    finally:
        _remove(beside)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the two could be exchanged in one step."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # no Linux, or an old one
        return False
    return bool(rename(_AT_WORKING_FOLDER, os.fsencode(one), _AT_WORKING_FOLDER, os.fsencode(other), _EXCHANGE) == 0)


def _put_in_place(beside: Path, target: Path) -> None:
    replaced = target.with_name(f".{target.name}.replaced")
    _remove(replaced)
    with suppress(FileNotFoundError):
        target.rename(replaced)
    try:
        beside.rename(target)
    except OSError:
        with suppress(FileNotFoundError):
            replaced.rename(target)
        raise
    _remove(replaced)
