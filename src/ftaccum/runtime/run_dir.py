"""A run's output folder: its absolute path, its lock and the paths of its files."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import filelock

from ..errors import CheckpointError, SettingsError

_PATIENCE = 0.5  # seconds to wait for the lock, as a run that is just ending may be deleting its file


@dataclass(frozen=True)
class RunDir:
    """The folder that a run writes to.

    Attributes:
        path: absolute, so that the run stays in one folder even if the working directory changes.
    """

    path: Path

    @classmethod
    def resolve(cls, output_dir: str) -> "RunDir":
        """Return the folder with its absolute path. `~` stands for the user's home directory.

        Raises:
            SettingsError: if the user has no home directory.
        """
        try:
            return cls(Path(output_dir).expanduser().absolute())
        except RuntimeError as error:
            raise _refused(output_dir, error) from error

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def tracker_folder(self, *, continues: bool) -> Path:
        """Return the folder for the files of trackers: `trackers/1`, or `trackers/n` for the nth run in this folder.

        Args:
            continues: whether the run continues one in this folder, whose trackers then continue in the newest folder.
        """
        folder = self.path / "trackers"
        numbers = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
        newest = max(numbers, default=0)
        return folder / str(max(1, newest if continues else newest + 1))

    def check(self) -> None:
        """Raise SettingsError if the folder cannot be created. Leave no folder behind that was not there."""
        missing = self._create()
        with suppress(OSError):  # unless another process has used it since
            for folder in missing:
                folder.rmdir()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Create the folder if it is missing, and keep other runs out of it.

        If the file system has no locks or is read-only, there is no lock. Code that writes to the folder reports that.
        The system releases the lock of a killed process, even if its data workers survive: they do not inherit it.

        Raises:
            SettingsError: if the folder cannot be created.
            CheckpointError: if another run holds the lock.
        """
        self._create()
        lock = filelock.FileLock(self.path / ".lock", timeout=_PATIENCE, fallback_to_soft=False)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise CheckpointError(
                [
                    f"`output_dir` is {str(self.path)!r}, but another run is using it ({self._owner()}), and two runs "
                    "would overwrite each other's files. Wait for that run to end, stop it, or give another folder."
                ]
            ) from error
        except OSError:
            yield
            return
        try:
            with suppress(OSError):
                (self.path / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
            yield
        finally:
            # Before the release: a run that has already opened the file then notices that it is gone, and reopens it.
            with suppress(OSError):
                (self.path / ".lock").unlink()
            lock.release()

    def is_locked(self) -> bool:
        """Return whether another run is using the folder."""
        try:
            with self.lock():
                return False
        except CheckpointError:
            return True

    def _create(self) -> list[Path]:
        """Create the folder if it is missing, and return the folders that were missing, the innermost first."""
        try:
            missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # ValueError: a name that is invalid on the file system
            raise _refused(str(self.path), error) from error
        return missing

    def _owner(self) -> str:
        with suppress(OSError):
            return (self.path / ".lock").read_text().strip() or "another process"
        return "another process"


def _refused(output_dir: str, error: Exception) -> SettingsError:
    return SettingsError(
        [f"`output_dir` is {output_dir!r}, which cannot be created: {error}. Give a folder that you can write to."]
    )
