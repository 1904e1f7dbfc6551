"""The checkpoints of a run, on the disk: which there are, which is sound, which go."""

import os
import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from ..runtime.log import logger
from .manifest import damage

_NAME = re.compile(r"update-(\d{8,})(?:-epoch-(\d{4,}))?")
_UNFINISHED = re.compile(rf"\.{_NAME.pattern}\.(?:partial|gone|replaced)")  # what a kill leaves of ours
_DAMAGED = "damaged-"
# One for what is put aside, and one for while the run goes on from a checkpoint that lies in the other.
_PREVIOUS = ("checkpoints.previous", "checkpoints.previous-2")


class CheckpointDirectory:
    """The folder `checkpoints` of a run's output folder. A name sorts by the number of updates; where an epoch has
    ended with an update, the checkpoint that has its validation loss comes after the one that has not."""

    def __init__(self, folder: Path) -> None:
        """Args:
        folder: `checkpoints` in a run's output folder.
        """
        self.folder = folder

    def place(self, n_updates: int, n_epochs: int | None = None) -> Path:
        """Where a checkpoint goes.

        Args:
            n_epochs: where the last update ended an epoch that has been evaluated, the epochs so far.
        """
        return self.folder / (f"update-{n_updates:08d}" + ("" if n_epochs is None else f"-epoch-{n_epochs:04d}"))

    def checkpoints(self) -> list[Path]:
        """Those that are there, sound or not, the newest first."""
        named = [path for path in self._all() if _NAME.fullmatch(path.name)]
        return sorted(named, key=_order, reverse=True)

    def newest_sound(self) -> tuple[Path | None, list[Path]]:
        """The newest checkpoint without damage, and those that are newer and will never be sound. Each that is passed
        over is logged. Nothing is moved: the folder may be another run's."""
        damaged: list[Path] = []
        for path in self.checkpoints():
            try:
                wrong = damage(path)
            except OSError as error:  # which may pass
                logger.warning(f"{path} cannot be read ({error}), and is passed over.")
                continue
            if wrong is None:
                return path, damaged
            logger.warning(f"{path} is damaged ({wrong}), and is passed over.")
            damaged.append(path)
        return None, damaged

    def prune(self, keep: int, best_epoch: int | None) -> None:
        """Removes all but the newest ones and that of the best epoch (counted from 1)."""
        for path in self.checkpoints()[keep:]:
            if best_epoch is None or _order(path)[1] != best_epoch:
                _remove(path)

    def set_aside(self, behind: Path | None, damaged: Collection[Path]) -> None:
        """Makes room for a run that goes on behind a checkpoint, or starts anew: what another one left that is newer is
        put into a folder beside, in place of what was there. What is removed or put aside is logged.

        Args:
            behind: in this folder or anywhere else. It stays where it is.
            damaged: of this folder or of another. The newest of its own keeps another name, the others are removed.
        """
        for path in self._all():
            if _UNFINISHED.fullmatch(path.name):
                logger.warning(f"{path} was not written to its end, and is removed.")
                shutil.rmtree(path, ignore_errors=True)
        behind = None if behind is None else behind.resolve()
        own = [path for path in damaged if _same(path.parent, self.folder)]
        if own:
            self._mark_damaged(own)
        is_own = behind is not None and _same(behind.parent, self.folder)
        first = _order(behind) if behind is not None and is_own else (-1, 0)
        newer = [path for path in self.checkpoints() if _order(path) > first and not _same(path, behind)]
        if not newer:
            return
        aside = next(folder for folder in self._beside() if behind is None or not _same(behind.parent, folder))
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for path in newer:
            path.rename(aside / path.name)
        logger.warning(f"Checkpoints of an earlier run are put aside, in {aside}.")

    def clear(self) -> None:
        """Removes them all, and those that were put aside."""
        for folder in (self.folder, *self._beside()):
            shutil.rmtree(folder, ignore_errors=True)

    def _mark_damaged(self, paths: Collection[Path]) -> None:
        """It would take the place of a sound one among the newest."""
        for path in self._all():
            if path.name.startswith(_DAMAGED):
                shutil.rmtree(path, ignore_errors=True)
        newest, *others = sorted(paths, key=_order, reverse=True)
        with suppress(OSError):
            for path in others:
                _remove(path)
            newest.rename(newest.with_name(f"{_DAMAGED}{newest.name}"))

    def _beside(self) -> list[Path]:
        return [self.folder.with_name(name) for name in _PREVIOUS]

    def _all(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_dir()] if self.folder.is_dir() else []


def _order(path: Path) -> tuple[int, int]:
    found = _NAME.fullmatch(path.name)
    return (-1, 0) if found is None else (int(found[1]), int(found[2] or 0))


def _same(path: Path, other: Path | None) -> bool:
    """Whether both lead to the same folder, however they are spelled."""
    try:
        return other is not None and os.path.samefile(path, other)
    except OSError:  # one of them is not there
        return False


def _remove(path: Path) -> None:
    """Under a name that nobody takes for a checkpoint's, for it may not be removed in one go."""
    gone = path.with_name(f".{path.name}.gone")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
