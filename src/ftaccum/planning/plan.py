"""All windows of a run whose rows can be counted beforehand."""

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
from .shuffle import balanced_order_of, order_of

_FEW = 6  # epochs whose numbers of windows are listed one by one
_MANY, _MOST_ROWS = 10**8, 2**63 - 1  # most updates or epochs (0.8 GB); most rows (64 bits)


@dataclass(frozen=True)
class Plan(BasePlan):
    """All windows of a run, known before anything is loaded.

    Each epoch has its own order of rows. It takes each row once or, if `classes` are given, draws as many rows with
    replacement, from each class with equal probability. With "flush", each epoch is cut into windows separately, so
    that its last window may be short. With "carry", all epochs are cut as one sequence, so that only the last window of
    the run may be short. `batch_sizes` gives the sizes of the windows.

    Attributes:
        n_rows: training rows, after the hold-out.
        n_epochs: passes over these rows.
        batch_sizes: the resolved sizes of an update.
        seed: the seed for the order of the rows.
        n_validation_rows: rows for evaluation.
        remainder: "flush" or "carry".
        max_updates: number of windows after which the run ends, unless the epochs end before; None for no limit.
        rate_scaling: how the learning rate follows k; see `rate_factor`.
        done: where the completed windows of a resumed run ended, in rows, if these settings would cut them differently.
        classes: the class of each row, from 0 on, to draw balanced epochs; -1 for rows that are never drawn.
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
    classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check that the run is not too long.

        Raises:
            SettingsError: if it has more updates, epochs or rows than can be planned.
        """
        rows = self._most_epochs * self.n_rows
        if max(self._most_updates, self._most_epochs) > _MANY or rows > _MOST_ROWS:
            raise SettingsError(
                [
                    f"`n_epochs` is {self.n_epochs}, which over {self.n_rows} rows makes up to {self._most_updates} "
                    f"updates in {self._most_epochs} epochs, but at most {_MANY} of either can be planned. Give fewer "
                    "epochs, or a smaller `max_updates`."
                ]
            )

    @property
    def _most_updates(self) -> int:
        """An upper bound on the updates: their number if all had the smallest size."""
        smallest = min(sizes.effective_batch_size for _, sizes in self.batch_sizes.stages())
        of_epochs = self.n_epochs * -(-self.n_rows // smallest)
        return min(of_epochs, self.max_updates or of_epochs)

    @property
    def _most_epochs(self) -> int:
        """An upper bound on the epochs begun: their number if all updates had the largest size."""
        largest = max(sizes.effective_batch_size for _, sizes in self.batch_sizes.stages())
        return min(self.n_epochs, self._most_updates * -(-largest // self.n_rows))

    @cached_property
    def _ends(self) -> np.ndarray:
        """The end of each window, in rows from the beginning of the first epoch."""
        n, end, of_all = len(self.done), max(self.done, default=0), self.n_epochs * self.n_rows
        at_most = self.max_updates or n + of_all
        ends = [np.array(self.done, dtype=int)]
        for (_, sizes), (following, _) in itertools.pairwise([*self.batch_sizes.stages(), (at_most, self.batch_sizes)]):
            size = min(sizes.effective_batch_size, of_all)
            while n < min(following, at_most) and end < of_all:
                # Add all consecutive windows of one size at once.
                room = of_all if self.remainder == "carry" else end + self.n_rows - end % self.n_rows
                last = min(end + (min(following, at_most) - n) * size, room)
                ends.append(np.append(np.arange(end + size, last, size), last))
                n, end = n + len(ends[-1]), last
        return np.concatenate(ends)

    @property
    def n_windows(self) -> int:
        return len(self._ends)

    def resume_after(self, done: Progress) -> tuple["Plan", int]:
        """Return the plan of a resumed run, and the epoch that continues.

        That is this plan if it has the same windows as those that are done. Otherwise it is one that continues after
        the same number of rows of the same epoch.
        """
        ends = np.cumsum(done.rows, dtype=int)
        plan = self
        if len(ends) and not (self.n_rows == done.n_rows and np.array_equal(ends, self._ends[: len(ends)])):
            epoch, in_epoch = divmod(int(ends[-1]), done.n_rows)
            end = epoch * self.n_rows + min(in_epoch, self.n_rows)
            plan = replace(self, done=tuple((ends * end // ends[-1]).tolist()))
        return plan, plan.epoch_after(len(ends))

    def n_windows_of(self, epoch: int) -> int:
        """Return the number of windows in one epoch; 0 if no update ends in it, or if the run never begins it."""
        return len(self._indices(epoch))

    @property
    def epochs(self) -> range:
        """The epochs that the run begins. `max_updates` may end it before the others."""
        return range(self._epoch_of(self.n_windows - 1) + 1)

    def rows_after(self, n_windows: int) -> int:
        """Return the number of rows in the first `n_windows` windows. Each epoch counts its rows again."""
        return int(self._ends[n_windows - 1]) if n_windows else 0

    def epochs_after(self, n_windows: int) -> float:
        return self.rows_after(n_windows) / self.n_rows

    def ends_epoch(self, n_windows: int) -> bool:
        """Return whether the last of the first `n_windows` windows ends its epoch."""
        return n_windows == self._indices(self._epoch_of(n_windows - 1)).stop

    def epoch_after(self, n_windows: int) -> int:
        """Return the epoch of the window after the first `n_windows`; `n_epochs` if there is none."""
        return self._epoch_of(n_windows) if n_windows < self.n_windows else self.n_epochs

    def windows(self, epoch: int, start: int = 0) -> Iterator[Window]:
        indices = self._indices(epoch)
        indices = indices[max(0, start - indices.start) :]
        before = self.rows_after(indices.start)
        orders = (self._order_of(e) for e in itertools.count(before // self.n_rows))
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
        notes, n = [], self.n_rows
        if wanted > n and self.remainder == "flush":
            notes.append(f"an epoch has only {n} rows, so an update has at most {n} rows instead of {wanted}")
        if late:
            notes.append(f"the run ends before update {min(late)}, where `gradient_accumulation_steps` would change")
        if self.n_windows < (self.max_updates or 0):
            notes.append(
                f"the epochs end before `max_updates`, {self.max_updates}; increase `n_epochs` for more updates"
            )
        return [f"Note: {note}" for note in notes]

    def __str__(self) -> str:
        """Return the arithmetic of the run, as lines of text."""
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

    def _order_of(self, epoch: int) -> list[int]:
        if self.classes:
            return balanced_order_of(epoch, self.classes, self.seed)
        return order_of(epoch, self.n_rows, self.seed)

    def _indices(self, epoch: int) -> range:
        """Return the indices of the windows of an epoch, which are those whose last row is in it."""
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
        return f"{full + bool(left)} ({full} full window{'' if full == 1 else 's'}{tail})"

    def _describe_remainder(self) -> str:
        if self.remainder == "flush":
            return "a remainder is flushed at the end of each epoch"
        last = self.rows_after(self.n_windows) - self.rows_after(self.n_windows - 1)
        wanted = self.batch_sizes.at(self.n_windows - 1).effective_batch_size
        short = f"; the last window has {last} rows" if last < wanted else ""
        return f"the remainder of an epoch is carried into the next{short}"

    def _describe_end(self) -> str:
        if self.n_windows != self.max_updates:
            return ""
        return f" (`max_updates`), the last of them in epoch {len(self.epochs)}"
