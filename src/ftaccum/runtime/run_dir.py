"""A run's output folder: its absolute path, its lock, and the paths in it."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import filelock

from ..errors import CheckpointError, SettingsError

_PATIENCE = 0.5  # seconds: a run that is just ending removes the file of its lock, which another may have opened


@dataclass(frozen=True)
class RunDir:
    """The folder that a run writes to.

    Attributes:
        path: absolute, so that the run stays in one folder whatever the working folder becomes.
    """

    path: Path

    @classmethod
    def resolve(cls, output_dir: str) -> "RunDir":
        """Return the folder as it will be found from any working folder; `~` is the user's home.

        Raises:
            SettingsError: if the user has no home.
        """
        try:
            return cls(Path(output_dir).expanduser().absolute())
        except RuntimeError as error:
            raise _refused(output_dir, error) from error

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Make the folder if it is missing, and keep other runs out of it. Where the file system has no locks, or
        nothing can be written, there is none: whoever writes there reports it.

        The system releases the lock of a process that is killed, also while its data workers live on: they do not
        inherit it.

        Raises:
            SettingsError: if the folder cannot be made.
            CheckpointError: where another run has the lock.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # ValueError: a name that the file system cannot spell
            raise _refused(str(self.path), error) from error
        lock = filelock.FileLock(self.path / ".lock", timeout=_PATIENCE, fallback_to_soft=False)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise CheckpointError(
                [
                    f"`output_dir` is {str(self.path)!r}, in which another run is going on ({self._owner()}), and two "
                    "would write over each other. Wait for its end, stop it, or name another folder."
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
            with suppress(
                OSError
            ):  # while it is locked: one who opened it before sees that it is gone, and opens again
                (self.path / ".lock").unlink()
            lock.release()

    def is_locked(self) -> bool:
        """Return whether another run is going on in the folder."""
        try:
            with self.lock():
                return False
        except CheckpointError:
            return True

    def _owner(self) -> str:
        with suppress(OSError):
            return (self.path / ".lock").read_text().strip() or "another process"
        return "another process"


def _refused(output_dir: str, error: Exception) -> SettingsError:
    return SettingsError(
        [f"`output_dir` {output_dir!r} cannot be made: {error}. Name a folder that can be written to."]
    )
