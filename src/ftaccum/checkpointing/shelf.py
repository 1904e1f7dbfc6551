"""The checkpoints of a run, on the disk: which there are, which is sound, which go."""

import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .manifest import damage

_NAME = re.compile(r"update-(\d{8,})(?:-epoch-(\d{4,}))?")
_PREVIOUS, _DAMAGED = "checkpoints.previous", "damaged-"


class Shelf:
    """The folder `checkpoints` of a run's output folder. A name sorts by the number of updates; where an epoch has
    ended with an update, the checkpoint that has its validation loss comes after the one that has not."""

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / "checkpoints"

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

    def newest_sound(self, tell: Callable[[str], None]) -> Path | None:
        """The newest checkpoint without damage. Of each that is passed over, `tell` gets a sentence, and it goes by
        another name from now on; what was not written to its end is removed."""
        for path in self._all():
            if path.name.startswith("."):
                tell(f"{path} was not written to its end, and is removed.")
                shutil.rmtree(path, ignore_errors=True)
        for path in self.checkpoints():
            wrong = damage(path)
            if wrong is None:
                return path
            tell(f"{path} is damaged ({wrong}), and is passed over.")
            with suppress(OSError):  # it would take the place of a sound one among the newest
                _rename(path, path.with_name(f"{_DAMAGED}{path.name}"))
        return None

    def prune(self, keep: int, best_epoch: int | None) -> None:
        """Removes all but the newest ones and that of the best epoch (counted from 1)."""
        for path in self.checkpoints()[keep:]:
            if best_epoch is None or _order(path)[1] != best_epoch:
                _remove(path)

    def set_aside(self, behind: Path | None) -> Path | None:
        """Makes room for a run that goes on behind a checkpoint, or starts anew: what another one left that is newer is
        put into a folder beside, in place of what was there. Returns that folder, or None where there was nothing."""
        for path in self._all():
            if path.name.startswith("."):
                shutil.rmtree(path, ignore_errors=True)
        first = (-1, 0) if behind is None or behind.parent != self.folder else _order(behind)
        newer = [path for path in self.checkpoints() if _order(path) > first]
        if not newer:
            return None
        aside = self.folder.with_name(_PREVIOUS)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for path in newer:
            path.rename(aside / path.name)
        return aside

    def clear(self) -> None:
        """Removes them all, and those that were put aside."""
        for folder in (self.folder, self.folder.with_name(_PREVIOUS)):
            shutil.rmtree(folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_dir()] if self.folder.is_dir() else []


def _order(path: Path) -> tuple[int, int]:
    found = _NAME.fullmatch(path.name)
    assert found is not None, "only those that are named so"
    return int(found[1]), int(found[2] or 0)


def _rename(path: Path, other: Path) -> None:
    shutil.rmtree(other, ignore_errors=True)
    path.rename(other)


def _remove(path: Path) -> None:
    """Under a name that nobody takes for a checkpoint's, for it may not be removed in one go."""
    gone = path.with_name(f".{path.name}.gone")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
