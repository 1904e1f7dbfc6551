"""Every window of a run on rows that can be counted."""

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..errors import SettingsError
from .base_plan import BasePlan, Progress, Window, describe_sizes
from .batch_size import BatchSizes
from .shuffle import order_of

_FEW = 6  # epochs, for their windows to be listed one by one
_MANY, _MOST_ROWS = 10**8, 2**63 - 1  # updates or epochs, in 0.8 GB; rows, as 64 bits count them


@dataclass(frozen=True)
class Plan(BasePlan):
    """Every window of a run, before anything is loaded.

    The epochs, each in its own order, lie one behind the other, and are cut into windows of the sizes that the updates
    want: each epoch by itself, so that its last window may be short ("flush"), or all of them as one ("carry"), so that
    only the last window of the run may be.

    Attributes:
        n_rows: training rows, after the hold-out.
        n_epochs: passes over them.
        batch_sizes: the resolved sizes of an update.
        seed: of the order of the rows.
        n_validation_rows: rows that are evaluated on.
        remainder: "flush" or "carry".
        max_updates: windows after which the run ends, if the epochs have not ended it before.
        rate_scaling: how the learning rate follows k; see `rate_factor`.
        done: where the first windows ended, if others than these settings make them are behind a run that goes on.
    """

    n_rows: int
    n_epochs: int
    batch_sizes: BatchSizes
    seed: int = 42
    n_validation_rows: int = 0
    remainder: str = "flush"
    max_updates: int | None = None
    rate_scaling: str = "none"
    done: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises:
        SettingsError: for a run of more updates or rows than can be listed.
        """
        rows = self._most_epochs * self.n_rows
        if max(self._most_updates, self._most_epochs) > _MANY or rows > _MOST_ROWS:
            raise SettingsError(
                [
                    f"`n_epochs` {self.n_epochs} over {self.n_rows} rows are up to {self._most_updates} updates in "
                    f"{self._most_epochs} epochs, and no more than {_MANY} of either can be planned. Give fewer "
                    "epochs, or `max_updates`."
                ]
            )

    @property
    def _most_updates(self) -> int:
        """As many updates there are at most: where all are of the smallest size."""
        smallest = min(sizes.effective_batch_size for _, sizes in self.batch_sizes.stages())
        of_epochs = self.n_epochs * -(-self.n_rows // smallest)
        return min(of_epochs, self.max_updates or of_epochs)

    @property
    def _most_epochs(self) -> int:
        """As many epochs are begun at most: where all updates are of the largest size."""
        largest = max(sizes.effective_batch_size for _, sizes in self.batch_sizes.stages())
        return min(self.n_epochs, self._most_updates * -(-largest // self.n_rows))

    @cached_property
    def _ends(self) -> np.ndarray:
        """Where each window ends, in rows from the beginning of the first epoch."""
        n, end, of_all = len(self.done), max(self.done, default=0), self.n_epochs * self.n_rows
        at_most = self.max_updates or n + of_all
        ends = [np.array(self.done, dtype=int)]
        for (_, sizes), (following, _) in itertools.pairwise([*self.batch_sizes.stages(), (at_most, self.batch_sizes)]):
            size = min(sizes.effective_batch_size, of_all)
            while n < min(following, at_most) and end < of_all:
                # As many windows of a size as come one behind the other.
                room = of_all if self.remainder == "carry" else end + self.n_rows - end % self.n_rows
                last = min(end + (min(following, at_most) - n) * size, room)
                ends.append(np.append(np.arange(end + size, last, size), last))
                n, end = n + len(ends[-1]), last
        return np.concatenate(ends)

    @property
    def n_windows(self) -> int:
        return len(self._ends)

    def resume_after(self, done: Progress) -> tuple["Plan", int]:
        """Return this plan where it has the windows that are done, else one that continues after as much of the same
        epoch; and the epoch that continues."""
        ends = np.cumsum(done.rows, dtype=int)
        plan = self
        if len(ends) and not (self.n_rows == done.n_rows and np.array_equal(ends, self._ends[: len(ends)])):
            epoch, in_epoch = divmod(int(ends[-1]), done.n_rows)
            end = epoch * self.n_rows + min(in_epoch, self.n_rows)
            plan = replace(self, done=tuple((ends * end // ends[-1]).tolist()))
        return plan, plan.epoch_after(len(ends))

    @property
    def windows_per_epoch(self) -> int:
        """Windows of the first epoch. Others may have others where rows are carried or k changes: `n_windows_of`."""
        return self.n_windows_of(0)

    def n_windows_of(self, epoch: int) -> int:
        """Windows of one epoch; 0 where it has fewer rows than the next update still wants, or is not begun."""
        return len(self._indices(epoch))

    @property
    def epochs(self) -> range:
        """Those that are begun: `max_updates` may end the run before the others."""
        return range(self._epoch_of(self.n_windows - 1) + 1)

    def rows_after(self, n_windows: int) -> int:
        """Rows that the first `n_windows` windows of the run hold, counted anew in every epoch."""
        return int(self._ends[n_windows - 1]) if n_windows else 0

    def ends_epoch(self, n_windows: int) -> bool:
        """Whether the first `n_windows` windows end with the last one of an epoch."""
        return n_windows == self._indices(self._epoch_of(n_windows - 1)).stop

    def epoch_after(self, n_windows: int) -> int:
        """The epoch of the window that follows the first `n_windows`; `n_epochs` where none does."""
        return self._epoch_of(n_windows) if n_windows < self.n_windows else self.n_epochs

    def windows(self, epoch: int, start: int = 0) -> Iterator[Window]:
        indices = self._indices(epoch)
        indices = indices[max(0, start - indices.start) :]
        before = self.rows_after(indices.start)
        orders = (order_of(e, self.n_rows, self.seed) for e in itertools.count(before // self.n_rows))
        rows = itertools.islice(itertools.chain.from_iterable(orders), before % self.n_rows, None)
        for index in indices:
            size = self.rows_after(index + 1) - self.rows_after(index)
            yield Window(index, epoch, tuple(itertools.islice(rows, size)))

    def sample_windows(self) -> Sequence[Window]:
        """Return the first and the last window of the first epoch, and the last one of the run."""
        epochs = [epoch for epoch in self.epochs if self.n_windows_of(epoch)]
        first, *others = self.windows(epochs[0])
        *_, last = self.windows(epochs[-1])
        return (first, *others[-1:], last)

    def notes(self) -> list[str]:
        stages = self.batch_sizes.stages()
        wanted = max(sizes.effective_batch_size for update, sizes in stages if update < self.n_windows)
        late = [update for update, _ in stages if update >= self.n_windows]
        found = {
            f"an update wants {wanted} rows, and an epoch has {self.n_rows}: one update each": (
                wanted > self.n_rows and self.remainder == "flush"
            ),
            f"the run ends before update {min(late, default=0)}, from which on k is to be another": bool(late),
            f"the epochs end before `max_updates`, {self.max_updates}; more `n_epochs` make more updates": (
                self.n_windows < (self.max_updates or 0)
            ),
        }
        return [f"Note: {note}" for note, holds in found.items() if holds]

    def __str__(self) -> str:
        """The arithmetic of the run, as a paragraph."""
        return "\n".join(
            [
                f"Training samples: {self.n_rows}",
                *describe_sizes(self.batch_sizes, self.rate_scaling),
                f"Updates per epoch: {self._describe_updates()}",
                f"Epochs: {self.n_epochs}, {self.n_windows} updates in all{self._describe_end()}",
                *([f"Validation samples: {self.n_validation_rows}"] if self.n_validation_rows else []),
                *self.notes(),
            ]
        )

    def _indices(self, epoch: int) -> range:
        """Of the windows of an epoch: those whose last row is one of its own."""
        return range(bisect_right(self._ends, epoch * self.n_rows), bisect_right(self._ends, (epoch + 1) * self.n_rows))

    def _epoch_of(self, window: int) -> int:
        return (self.rows_after(window + 1) - 1) // self.n_rows

    def _describe_updates(self) -> str:
        b = self.batch_sizes
        if self.remainder == "carry" or b.later:
            counts = np.bincount((self._ends - 1) // self.n_rows).tolist()
            listed = ", ".join(map(str, counts)) if len(counts) <= _FEW else f"{min(counts)} to {max(counts)}"
            return (str(counts[0]) if len(set(counts)) == 1 else listed) + f" ({self._describe_remainder()})"
        left = self.n_rows % b.effective_batch_size
        micro_batches = math.ceil(left / b.batch_size)
        tail = f"; the remainder of {left} rows (micro-batches: {micro_batches}) is flushed as 1 more" if left else ""
        full = self.n_rows // b.effective_batch_size
        return f"{full + bool(left)} ({full} full windows{tail})"

    def _describe_remainder(self) -> str:
        if self.remainder == "flush":
            return "a remainder is flushed at the end of each epoch"
        last = self.rows_after(self.n_windows) - self.rows_after(self.n_windows - 1)
        wanted = self.batch_sizes.at(self.n_windows - 1).effective_batch_size
        short = f"; the last one has {last} rows" if last < wanted else ""
        return f"what is left of an epoch is carried into the next{short}"

    def _describe_end(self) -> str:
        if self.n_windows != self.max_updates:
            return ""
        return f" (`max_updates`), the last of them in epoch {len(self.epochs)}"
