"""The writer of checkpoints: in a thread, one at a time."""

import errno
import shutil
import threading
from pathlib import Path

from ..runtime.atomic_files import atomic_directory
from ..runtime.log import logger
from .directory import CheckpointDirectory
from .format import Snapshot
from .manifest import seal


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

    def write(self, snapshot: Snapshot, place: Path, best: int | None) -> None:
        """Begin to write a checkpoint. The previous one must be finished.

        Args:
            best: number of updates at the best evaluation, whose checkpoint is always kept.
        """
        self._thread = threading.Thread(target=self._write, args=(snapshot, place, best), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until the current checkpoint is written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def keep_last(self, *, keeps: bool) -> None:
        """Remove all checkpoints; if `keeps`, all except the newest, whose size is logged. Log errors as warnings."""
        kept = self.last if keeps else None
        try:
            self._directory.finish(kept)
            if kept is not None:
                size = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file())
                logger.info(
                    f"Kept the newest checkpoint, from which the run can be extended: {kept} ({size / 1e6:,.1f} MB). "
                    "`keep_checkpoints=0` keeps none."
                )
        except OSError as error:
            logger.warning(f"Old checkpoints in {self._directory.folder} could not be removed: {error}.")

    def _write(self, snapshot: Snapshot, place: Path, best: int | None) -> None:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(place.parent).free
            if free < snapshot.n_bytes:  # do not fill up a disk that others write to
                raise OSError(errno.ENOSPC, f"No space left on device ({_megabytes(free)} free)")
            with atomic_directory(place) as folder:
                snapshot.write(folder)
                seal(folder)
            self.last = place
            self._directory.prune(self._keep, best)
        except Exception as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
            there = f"the newest checkpoint is {self.last}" if self.last else "there is no checkpoint yet"
            logger.warning(
                f"The checkpoint {place.name} ({_megabytes(snapshot.n_bytes)}) could not be written: {why}. "
                f"Training continues and will try again at the next checkpoint; {there}."
            )


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.0f} MB"
