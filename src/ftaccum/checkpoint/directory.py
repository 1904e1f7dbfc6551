"""The checkpoint folder of a run: list, find, move and remove checkpoints."""

import os
import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from ..runtime.log import logger
from .manifest import damage

_NAME = re.compile(r"update-(\d{8,})(?:-epoch-(\d{4,}))?")
_UNFINISHED = re.compile(rf"\.{_NAME.pattern}\.(?:partial|gone|replaced)")  # ours, left by a killed process
_DAMAGED = "damaged-"
# Folders for older checkpoints. The second is for runs that resume from a checkpoint in the first.
_PREVIOUS = ("checkpoints.previous", "checkpoints.previous-2")


class CheckpointDirectory:
    """The folder `checkpoints` in a run's output folder.

    Checkpoints sort by their number of updates. If an epoch ended with an update, the checkpoint that was saved at its
    end sorts after one that was saved before its evaluation.
    """

    def __init__(self, folder: Path) -> None:
        """Args:
        folder: the folder `checkpoints` in a run's output folder.
        """
        self.folder = folder

    def place(self, n_updates: int, n_epochs: int | None) -> Path:
        """Return the path of a checkpoint.

        Args:
            n_epochs: number of epochs so far, if the last update ended one.
        """
        return self.folder / (f"update-{n_updates:08d}" + ("" if n_epochs is None else f"-epoch-{n_epochs:04d}"))

    def checkpoints(self) -> list[Path]:
        """Return all checkpoints, sound or damaged, newest first."""
        named = [path for path in self._all() if _NAME.fullmatch(path.name)]
        return sorted(named, key=_order, reverse=True)

    def newest_sound(self) -> tuple[Path | None, list[Path]]:
        """Return the newest sound checkpoint, if any, and the newer checkpoints that are damaged.

        Logs each checkpoint that it skips. Moves nothing, because the folder may belong to another run.
        """
        damaged: list[Path] = []
        for path in self.checkpoints():
            try:
                wrong = damage(path)
            except OSError as error:  # may be temporary
                logger.warning(f"Skipped {path}, which cannot be read: {error}")
                continue
            if wrong is None:
                return path, damaged
            logger.warning(f"Skipped {path}, which is damaged: {wrong}.")
            damaged.append(path)
        return None, damaged

    def prune(self, keep: int, best: int | None) -> None:
        """Remove all checkpoints except the newest `keep` and the newest with the weights of the best evaluation.

        Args:
            best: number of updates at that evaluation; None if there is none.
        """
        found = self.checkpoints()
        of_best = next((path for path in found if _order(path)[0] == best), None)
        for path in found[keep:]:
            if path != of_best:
                _remove(path)

    def set_aside(self, resumed_from: Path | None, damaged: Collection[Path]) -> None:
        """Clear the folder for a run that resumes from a checkpoint or starts anew.

        Moves newer checkpoints of an earlier run to a sibling folder, which loses its previous contents. Removes
        unfinished checkpoints. Logs both.

        Args:
            resumed_from: the checkpoint to resume from, in this folder or elsewhere, which stays in place; None for a
                new run.
            damaged: damaged checkpoints. Of those in this folder, the newest is renamed and the others are removed.
        """
        for path in self._all():
            if _UNFINISHED.fullmatch(path.name):
                logger.warning(f"Removed {path}, which was not written completely.")
                shutil.rmtree(path, ignore_errors=True)
        resumed_from = None if resumed_from is None else resumed_from.resolve()
        own = [path for path in damaged if _same(path.parent, self.folder)]
        if own:
            self._mark_damaged(own)
        is_own = resumed_from is not None and _same(resumed_from.parent, self.folder)
        first = _order(resumed_from) if resumed_from is not None and is_own else (-1, 0)
        newer = [path for path in self.checkpoints() if _order(path) > first and not _same(path, resumed_from)]
        if not newer:
            return
        aside = next(
            folder
            for folder in self._set_aside_folders()
            if resumed_from is None or not _same(resumed_from.parent, folder)
        )
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for path in newer:
            path.rename(aside / path.name)
        logger.warning(f"Moved checkpoints of an earlier run to {aside}. They are removed when this run has finished.")

    def finish(self, kept: Path | None) -> None:
        """Remove all checkpoints of a finished run except one, and those that `set_aside` moved.

        Args:
            kept: the checkpoint to keep, in this folder or elsewhere; None removes all, damaged ones included.

        Raises:
            OSError: if a checkpoint cannot be removed.
        """
        for path in self.checkpoints():
            if not _same(path, kept):
                _remove(path)
        for folder in self._set_aside_folders():
            if kept is None or not _same(folder, kept.parent):
                shutil.rmtree(folder, ignore_errors=True)
        if kept is None:
            for path in self._all():
                if path.name.startswith(_DAMAGED):
                    shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):  # it holds files of the user, or is not there
                self.folder.rmdir()

    def clear(self) -> None:
        """Remove all checkpoints, including those that `set_aside` moved."""
        for folder in (self.folder, *self._set_aside_folders()):
            shutil.rmtree(folder, ignore_errors=True)

    def _mark_damaged(self, paths: Collection[Path]) -> None:
        """Rename the newest of these checkpoints and remove the others, so that `prune` does not count them."""
        for path in self._all():
            if path.name.startswith(_DAMAGED):
                shutil.rmtree(path, ignore_errors=True)
        newest, *others = sorted(paths, key=_order, reverse=True)
        with suppress(OSError):
            for path in others:
                _remove(path)
            newest.rename(newest.with_name(f"{_DAMAGED}{newest.name}"))

    def _set_aside_folders(self) -> list[Path]:
        return [self.folder.with_name(name) for name in _PREVIOUS]

    def _all(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_dir()] if self.folder.is_dir() else []


def _order(path: Path) -> tuple[int, int]:
    found = _NAME.fullmatch(path.name)
    return (-1, 0) if found is None else (int(found[1]), int(found[2] or 0))


def _same(path: Path, other: Path | None) -> bool:
    """Return whether both paths lead to the same folder."""
    try:
        return other is not None and os.path.samefile(path, other)
    except OSError:  # one of them does not exist
        return False


def _remove(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, because a partly removed one must not look like a checkpoint."""
    gone = path.with_name(f".{path.name}.gone")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
