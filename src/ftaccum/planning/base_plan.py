"""What a run follows, whether its rows can be counted beforehand or not."""

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

    `index` counts windows over the whole run, from 0; `rows` are positions in the training rows. A window that goes on
    in the next epoch can have a row twice, and belongs to the epoch that its last row is of.
    """

    index: int
    epoch: int
    rows: RowIndices


@dataclass(frozen=True)
class Progress:
    """How far a run had come when it was saved.

    Attributes:
        rows: rows of each window that is done.
        last_epoch: epoch of the last one, from 0.
        n_rows: rows of an epoch at that time; of a stream, those that were looked at.
        max_updates: updates after which the run was to end.
    """

    rows: Sequence[int]
    last_epoch: int
    n_rows: int
    max_updates: int | None


class BasePlan(ABC):
    """Windows, epoch by epoch.

    Attributes:
        can_resize: whether a run can be resumed with updates of another size.
        n_epochs: passes over the rows, at most.
        batch_sizes: the resolved sizes of an update.
        seed: of what is drawn.
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
        """Windows of the run, which the schedule counts on."""

    @property
    @abstractmethod
    def epochs(self) -> Iterable[int]:
        """Those that are begun."""

    @abstractmethod
    def n_windows_of(self, epoch: int) -> int:
        """Windows of one epoch."""

    @abstractmethod
    def rows_after(self, n_windows: int) -> int:
        """Return the rows that the first windows of the run hold, counted anew in every epoch."""

    @abstractmethod
    def ends_epoch(self, n_windows: int) -> bool:
        """Return whether the first `n_windows` windows end with the last one of an epoch, as far as that is known."""

    @abstractmethod
    def windows(self, epoch: int, start: int = 0) -> Iterator[Window]:
        """The windows of one epoch (from 0), without those whose index in the run is below `start`."""

    @abstractmethod
    def resume_after(self, done: Progress) -> tuple["BasePlan", int]:
        """Return the plan for a run whose first windows are done, and the epoch that continues after them (`n_epochs`
        where none does)."""

    def sample_windows(self) -> Sequence[Window]:
        """Return the windows that are most unlike, as far as they are known before training."""
        return ()

    def notes(self) -> list[str]:
        """What a user should know of it before training starts."""
        return []

    def shortfall(self) -> str | None:
        """After the last epoch, the sentence that says that there were fewer windows than the schedule counted on."""
        return None

    def rate_factor(self, update: int) -> float:
        """What the scheduled learning rate of an update is multiplied by."""
        k, first = self.batch_sizes.at(update).gradient_accumulation_steps, self.batch_sizes.gradient_accumulation_steps
        return rate_factor(self.rate_scaling, k / first)

    def warmup_updates(self, warmup_steps: int, warmup_ratio: float) -> int:
        """Warm-up in updates: `warmup_steps`, or that share of all updates, rounded up."""
        return warmup_steps or math.ceil(warmup_ratio * self.n_windows)


def describe_sizes(batch_sizes: BatchSizes, rate_scaling: str) -> list[str]:
    """The lines that say how large updates are, and how their rate follows where that changes."""
    stages = batch_sizes.stages()

    def over_training(values: Iterable[object]) -> str:
        return ", ".join(f"after {u} updates {v}" if u else str(v) for (u, _), v in zip(stages, values, strict=True))

    first = batch_sizes.gradient_accumulation_steps
    factors = [rate_factor(rate_scaling, sizes.gradient_accumulation_steps / first) for _, sizes in stages]
    return [
        f"Batch size: {batch_sizes.batch_size}",
        f"Gradient accumulation steps: {over_training(sizes.gradient_accumulation_steps for _, sizes in stages)}",
        f"Processes: {batch_sizes.num_processes}",
        f"Effective batch size: {over_training(sizes.effective_batch_size for _, sizes in stages)}",
        *([f"Learning rate times: {over_training(f'{f:.4g}' for f in factors)}"] if rate_scaling != "none" else []),
    ]
