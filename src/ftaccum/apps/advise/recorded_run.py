"""A run of `ftaccum train` as its folder records it: the command, and a checkpoint to continue from."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ...arguments import read_settings
from ...checkpoint.directory import CheckpointDirectory
from ...checkpoint.format import Checkpoint
from ...checkpoint.manifest import damage
from ...errors import DataError, SettingsError
from ...runtime.run_dir import RunDir
from ...settings.recipe import SIZES, Recipe
from ...tasks.arguments import TrainArguments
from ...tracking.result import Result
from ...tracking.run_record import RunRecord
from ...tracking.update_times import mean_speed
from ..run_folder import check_run_folder
from .experiment import Experiment, experiment_of, steady_rate


@dataclass(frozen=True)
class RecordedRun:
    """A run of `ftaccum train`, and the checkpoint that a check continues.

    Attributes:
        folder: the run's output folder.
        record: what it is.
        checkpoint: the checkpoint, of a run that has completed at least one update.
    """

    folder: Path
    record: RunRecord
    checkpoint: Checkpoint

    @classmethod
    def read(cls, folder: Path, checkpoint: str | None) -> "RecordedRun":
        """Read the record and the checkpoint. Nothing in the folder is changed.

        Args:
            folder: the run's output folder.
            checkpoint: the name or path of the checkpoint; None for the newest.

        Raises:
            SettingsError: if a call from Python started the run, it reads a stream, or it has no such checkpoint.
        """
        check_run_folder(folder)
        record = RunRecord.read(RunDir(folder).record)
        if record is None:
            raise SettingsError(
                [f"{str(folder)!r} has no `run.json`, which `--check` needs. Give a folder of `ftaccum train`."]
            )
        if not record.sources:
            raise SettingsError(
                [
                    f"The run in {str(folder)!r} was started from Python, and its folder does not record the model and "
                    "the rows. `--check` needs a run of `ftaccum train`. From Python, call `test_fine_tuning` with "
                    "half and twice the `effective_batch_size` on the same rows, or use `ftaccum.search`."
                ]
            )
        if record.sources.get("streaming"):
            raise SettingsError(
                [
                    f"The run in {str(folder)!r} reads a stream, whose rows have no other order. `--check` needs "
                    "`ftaccum train` without `--streaming`."
                ]
            )
        return cls(folder, record, _open(_find(folder, checkpoint, record).absolute()))

    @property
    def named(self) -> TrainArguments:
        """The options of the command that name the model, the data and the task."""
        known = {f.name for f in fields(TrainArguments)}
        return read_settings(TrainArguments, {n: v for n, v in self.record.sources.items() if n in known})

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings of the run's Recipe, without those that set the size of an update."""
        known = {f.name for f in fields(Recipe)} - set(SIZES)
        return {name: value for name, value in self.record.recipe.items() if name in known}

    @property
    def run_with(self) -> Mapping[str, Any]:
        """The settings of its Runtime that the checkpoint records, and the device."""
        return self.checkpoint.metadata["run_with"]

    @property
    def n_updates(self) -> int:
        """Number of updates before the checkpoint."""
        return len(self.checkpoint.windows)

    @property
    def rows_done(self) -> int:
        """Number of rows before the checkpoint. Each epoch counts its rows again."""
        return sum(window.rows for window in self.checkpoint.windows)

    @property
    def n_rows(self) -> int:
        """Number of training rows."""
        return int(self.checkpoint.metadata["n_rows"])

    @property
    def effective_batch_size(self) -> int:
        """Rows of a full update at the checkpoint."""
        return self.record.batch_sizes().at(self.n_updates - 1).effective_batch_size

    @cached_property
    def rates(self) -> tuple[float, bool]:
        """The learning rate that the branches keep, and whether it is the one of the last update."""
        return steady_rate([window.learning_rate for window in self.checkpoint.windows])

    @property
    def is_warming_up(self) -> bool:
        """Whether the checkpoint lies inside the warm-up: rates have only risen, and not to the peak."""
        rates, peak = [window.learning_rate for window in self.checkpoint.windows], self._peak
        return rates == sorted(rates) and rates[-1] < peak * (1 - 1e-9)

    @property
    def _peak(self) -> float:
        return self.checkpoint.metadata["trained_on"]["learning_rate"][0]

    @property
    def planned_rows(self) -> int:
        """Rows that the whole run trains on, if nothing stops it early."""
        most, updates = self.record.recipe["n_epochs"] * self.n_rows, self.record.recipe.get("max_updates")
        return min(most, updates * self.effective_batch_size) if updates else most

    def experiment(self, share: float, seeds: int) -> Experiment:
        """Return the experiment that branches this run; for arguments and errors see `experiment_of`."""
        (rate, _), peak = self.rates, self._peak
        if not rate or not peak:
            raise SettingsError(
                [f"The learning rate was 0 in all {self.n_updates} updates so far. Check the run after its warm-up."]
            )
        optimizer = self.record.recipe.get("optimizer") or "adamw"
        size, n_rows = self.effective_batch_size, self.planned_rows
        return experiment_of(size, n_rows, optimizer, rate=rate, peak=peak, share=share, seeds=seeds)

    def seconds_of(self, n_rows: int) -> float | None:
        """Return the seconds in which the run trained on as many rows; None if that is not known."""
        speed = mean_speed(self.checkpoint.windows, "rows")
        return None if math.isnan(speed) else n_rows / speed


def _find(folder: Path, checkpoint: str | None, record: RunRecord) -> Path:
    """Return the path of the named checkpoint, or of the newest.

    Raises:
        SettingsError: if there is none that is sound.
    """
    checkpoints = RunDir(folder).checkpoints
    if checkpoint is None:
        newest, _ = CheckpointDirectory(checkpoints).newest_sound()
        if newest is None:
            raise SettingsError(
                [f"The run in {str(folder)!r} has no sound checkpoint to continue from. {_why_none(folder, record)}"]
            )
        return newest
    named = next((path for path in (checkpoints / checkpoint, Path(checkpoint).expanduser()) if path.is_dir()), None)
    if named is None:
        there = ", ".join(path.name for path in CheckpointDirectory(checkpoints).checkpoints()) or "none"
        raise SettingsError([f"`checkpoint` is {checkpoint!r}, but there is no such folder. The run has: {there}."])
    if wrong := damage(named):
        raise SettingsError([f"`checkpoint` is {checkpoint!r}, which is not a sound checkpoint: {wrong}."])
    return named


def _why_none(folder: Path, record: RunRecord) -> str:
    """Return a sentence on why a run has no sound checkpoint, and what helps."""
    if not record.keep_checkpoints:
        return "It kept none, because `keep_checkpoints` was 0."
    with suppress(DataError):
        result = Result.load(folder)
        if not math.isfinite(result.loss_history[-1]):
            return (
                "The loss of its last update was not finite, and weights that are not finite are not kept. Find the "
                "cause first, such as a too high learning rate, and train again."
            )
    return "They were removed, are damaged, or none was saved before the run ended. Train again."


def _open(path: Path) -> Checkpoint:
    try:
        checkpoint = Checkpoint.opened(path)
        _ = checkpoint.metadata["run_with"], checkpoint.metadata["trained_on"]["learning_rate"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SettingsError(
            [f"The checkpoint {str(path)!r} cannot be read: {error!r}. Another version of ftaccum may have written it."]
        ) from error
    if not checkpoint.windows:
        raise SettingsError([f"The checkpoint {str(path)!r} was saved before the first update."])
    return checkpoint
