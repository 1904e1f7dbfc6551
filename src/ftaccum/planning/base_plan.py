"""The plan that a run follows, whether or not its rows can be counted beforehand."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from .batch_size import BatchSizes, rate_factor
from .micro_batches import RowIndices


@dataclass(frozen=True)
class Window:
    """The rows of one update.

    `index` counts windows over the whole run, from 0. `rows` are positions in the training rows. A window that
    continues into the next epoch may contain a row twice. It belongs to the epoch of its last row.
    """

    index: int
    epoch: int
    rows: RowIndices


@dataclass(frozen=True)
class Progress:
    """How far a run had come when it was saved.

    Attributes:
        rows: number of rows in each completed window.
        last_epoch: epoch of the last completed window, from 0.
        n_rows: rows per epoch at that time; for a stream, the rows that were examined before training.
        max_updates: number of updates after which the run was to end.
    """

    rows: Sequence[int]
    last_epoch: int
    n_rows: int
    max_updates: int | None


class BasePlan(ABC):
    """The windows of a run, epoch by epoch.

    Attributes:
        can_resize: whether a run can be resumed with updates of another size.
        n_epochs: most passes over the rows.
        batch_sizes: the resolved sizes of an update.
        seed: the seed of all random choices.
        rate_scaling: how the learning rate follows k; see `rate_factor`.
        remainder: "flush" or "carry".
    """

    can_resize: ClassVar[bool] = True
    n_epochs: int
    batch_sizes: BatchSizes
    seed: int
    rate_scaling: str
    remainder: str

    @property
    @abstractmethod
    def n_windows(self) -> int:
        """Number of windows in the run, for which the learning rate schedule is planned."""

    @property
    @abstractmethod
    def epochs(self) -> Iterable[int]:
        """The epochs that the run begins."""

    @abstractmethod
    def n_windows_of(self, epoch: int) -> int:
        """Return the number of windows in one epoch."""

    @abstractmethod
    def rows_after(self, n_windows: int) -> int:
        """Return the number of rows in the first `n_windows` windows. Each epoch counts its rows again."""

    @abstractmethod
    def epochs_after(self, n_windows: int) -> float:
        """Return the number of epochs in the first `n_windows` windows, with a fraction as far as that is known."""

    @abstractmethod
    def ends_epoch(self, n_windows: int) -> bool:
        """Return whether the last of the first `n_windows` windows ends its epoch, as far as that is known."""

    @abstractmethod
    def windows(self, epoch: int, start: int = 0) -> Iterator[Window]:
        """Yield the windows of one epoch (from 0) whose index in the run is at least `start`."""

    @abstractmethod
    def resume_after(self, done: Progress) -> tuple["BasePlan", int]:
        """Return the plan for a run whose first windows are done, and the epoch that continues after them.

        The epoch is `n_epochs` if none continues.
        """

    def sample_windows(self) -> Sequence[Window]:
        """Return the windows that differ most from each other, as far as they are known before training."""
        return ()

    def notes(self) -> list[str]:
        """Return lines that a user should read before training starts."""
        return []

    def shortfall(self) -> str | None:
        """After the last epoch, return a sentence if there were fewer windows than the schedule was planned for."""
        return None

    def rate_factor(self, update: int) -> float:
        """Return the factor by which to multiply the scheduled learning rate of an update."""
        k, first = self.batch_sizes.at(update).gradient_accumulation_steps, self.batch_sizes.gradient_accumulation_steps
        return rate_factor(self.rate_scaling, k / first)

    def warmup_updates(self, warmup_steps: int, warmup_ratio: float) -> int:
        """Return the number of warm-up updates: `warmup_steps`, or that share of all updates, rounded up."""
        return warmup_steps or math.ceil(warmup_ratio * self.n_windows)


def describe_sizes(batch_sizes: BatchSizes, rate_scaling: str) -> list[str]:
    """Return the banner's lines about the sizes of updates."""
    return [f"{name}: {value}" for name, value in named_sizes(batch_sizes, rate_scaling).items()]


def named_sizes(batch_sizes: BatchSizes, rate_scaling: str) -> dict[str, str]:
    """Return the sizes of updates, and the learning rate's factors if it follows k, by name.

    For a size that changes during training, the value contains its changes.
    """
    stages = batch_sizes.stages()

    def over_training(values: Iterable[object]) -> str:
        return ", ".join(f"after {u} updates {v}" if u else str(v) for (u, _), v in zip(stages, values, strict=True))

    first = batch_sizes.gradient_accumulation_steps
    factors = [rate_factor(rate_scaling, sizes.gradient_accumulation_steps / first) for _, sizes in stages]
    return {
        "Batch size": str(batch_sizes.batch_size),
        "Gradient accumulation steps": over_training(sizes.gradient_accumulation_steps for _, sizes in stages),
        "Processes": str(batch_sizes.num_processes),
        "Effective batch size": over_training(sizes.effective_batch_size for _, sizes in stages),
        **({"Learning rate factor": over_training(f"{f:.4g}" for f in factors)} if rate_scaling != "none" else {}),
    }
