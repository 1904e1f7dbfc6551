"""The writer of checkpoints: in a thread, one at a time."""

import errno
import shutil
import threading
from pathlib import Path
from typing import cast

from ..insight.format import format_bytes
from ..runtime.atomic_files import atomic_directory
from ..runtime.host import free_on_host
from ..runtime.log import logger
from .directory import CheckpointDirectory
from .format import Snapshot
from .manifest import seal
from .shards import Shard

ROOM = 1.2  # free host memory that a copy requires, as a multiple of its size


class CheckpointWriter:
    """The writer that saves checkpoints in a thread, one at a time, and removes old ones.

    If a checkpoint cannot be written, it logs a warning. The run and earlier checkpoints are not affected.

    Attributes:
        last: the newest sound checkpoint of this run, or the one that it resumed from.
    """

    def __init__(self, directory: CheckpointDirectory, keep: int, last: Path | None) -> None:
        self.last = last
        self._directory, self._keep = directory, keep
        self._thread: threading.Thread | None = None

    def has_room(self, n_bytes: int) -> bool:
        """Return whether host memory has room for a copy of a snapshot of this size."""
        return n_bytes * ROOM < free_on_host()

    def write(self, snapshot: Snapshot | Shard, place: Path, best: int | None) -> None:
        """Begin to write a checkpoint. The previous one must be finished.

        Args:
            best: number of updates at the best evaluation, whose checkpoint is always kept.
        """
        whole = cast(Snapshot, snapshot)  # the main process alone writes, so there are no shards
        self._thread = threading.Thread(target=self._write, args=(whole, place, best), daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Wait until the snapshot is written, so that the run may change the tensors in it."""
        self.finish()

    def status(self) -> list[bool]:
        """Return whether this process still writes its part of a checkpoint that others wait for, and whether that
        failed."""
        return [False, False]

    def advance(self, *, busy: bool, failed: bool) -> None:
        """Go on with a checkpoint, given whether any process has these states."""

    def finish(self) -> None:
        """Wait until the current checkpoint is written. All processes must call this together."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Wait until the current checkpoint is written, if the other processes may be gone."""
        self.finish()

    def keep_last(self, *, keeps: bool) -> None:
        """Remove all checkpoints; if `keeps`, all except the newest, whose size is logged. Log errors as warnings."""
        kept = self.last if keeps else None
        try:
            self._directory.finish(kept)
            if kept is not None:
                size = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file())
                logger.info(
                    f"Kept the newest checkpoint, from which the run can be extended: {kept} ({format_bytes(size)}). "
                    "`keep_checkpoints=0` keeps none."
                )
        except OSError as error:
            logger.warning(f"Old checkpoints in {self._directory.folder} could not be removed: {error}.")

    def _write(self, snapshot: Snapshot, place: Path, best: int | None) -> None:
        try:
            check_disk(place, snapshot.n_bytes)
            with atomic_directory(place) as folder:
                snapshot.write(folder)
                seal(folder)
            self._put_in_place(place, best)
        except Exception as error:
            self._warn(place, snapshot.n_bytes, reason(error))

    def _put_in_place(self, place: Path, best: int | None) -> None:
        self.last = place
        self._directory.prune(self._keep, best)

    def _warn(self, place: Path, n_bytes: int, why: str) -> None:
        there = f"the newest checkpoint is {self.last}" if self.last else "there is no checkpoint yet"
        logger.warning(
            f"The checkpoint {place.name} ({format_bytes(n_bytes)}) could not be written: {why}. "
            f"Training continues and will try again at the next checkpoint; {there}."
        )


def check_disk(place: Path, n_bytes: int) -> None:
    """Make the folder for a checkpoint.

    Raises:
        OSError: if it cannot be made, or if the disk has no room. A full disk would fail others that write to it.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place.parent).free
    if free < n_bytes:
        raise OSError(errno.ENOSPC, f"No space left on device ({format_bytes(free)} free)")


def reason(error: Exception) -> str:
    """Return a clause on why a checkpoint could not be written."""
    return error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
