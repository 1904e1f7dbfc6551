"""Writing checkpoints while training goes on."""

import errno
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from ..runtime.atomic_files import atomic_directory
from .directory import CheckpointDirectory
from .format import Snapshot
from .manifest import seal


class CheckpointWriter:
    """Writes one checkpoint after the other in a thread of its own, and removes old ones. One that cannot be written is
    told, and costs neither the run nor the checkpoints before it.

    Attributes:
        last: the newest sound one of this run, or the one that it went on from.
    """

    def __init__(
        self, directory: CheckpointDirectory, keep: int, tell: Callable[[str], None], last: Path | None
    ) -> None:
        """Args:
        keep: how many of the newest stay.
        tell: shows a sentence to the user, from whichever thread.
        """
        self.last = last
        self._directory, self._keep, self._tell = directory, keep, tell
        self._thread: threading.Thread | None = None

    def write(self, snapshot: Snapshot, place: Path, best_epoch: int | None) -> None:
        """Begins to write; the one before must have been finished.

        Args:
            best_epoch: the epoch (from 1) whose checkpoint stays, however many come after.
        """
        self._thread = threading.Thread(target=self._written, args=(snapshot, place, best_epoch), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits for what is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _written(self, snapshot: Snapshot, place: Path, best_epoch: int | None) -> None:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(place.parent).free
            if free < snapshot.n_bytes:  # not to fill up what others write to as well
                raise OSError(errno.ENOSPC, f"No space left on device, which has {_megabytes(free)}")
            with atomic_directory(place) as folder:
                snapshot.write(folder)
                seal(folder)
            self.last = place
            self._directory.prune(self._keep, best_epoch)
        except Exception as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
            there = f"{self.last} is the newest that there is" if self.last else "there is none yet"
            self._tell(
                f"The checkpoint {place.name}, of {_megabytes(snapshot.n_bytes)}, could not be written: {why}. "
                f"Training goes on, and the next one will be tried; {there}."
            )


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.0f} MB"
