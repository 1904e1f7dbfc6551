"""The windows of a run on a stream, whose rows are counted as they arrive."""

import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from .base_plan import BasePlan, Progress, Window, describe_sizes
from .batch_size import BatchSizes

# Read(epoch, n, start) reads up to n more rows of an epoch and returns how many it got: fewer than n only if the epoch
# has ended. Rows before position `start` are no longer needed.
Read = Callable[[int, int, int], int]


@dataclass
class StreamPlan(BasePlan):
    """The windows of a stream: each takes the next rows, as many as its update wants.

    A position is the index of a row among all rows read, over all epochs. The remainder of an epoch becomes a window
    ("flush") or is filled up from the next epoch ("carry"). A plan is used only once: each epoch in turn, and each
    window in turn. While one window is read, the one before it may still be in use.

    Attributes:
        n_epochs: most passes over the stream.
        max_updates: most windows; the learning rate schedule is planned for this number.
        read: reads rows of the stream.
    """

    can_resize: ClassVar[bool] = False
    n_epochs: int
    batch_sizes: BatchSizes
    max_updates: int
    read: Read
    seed: int = 42
    n_validation_rows: int = 0
    remainder: str = "flush"
    rate_scaling: str = "none"
    _counts: Counter[int] = field(init=False, default_factory=Counter)  # windows per epoch
    _came: int = field(init=False, default=0)
    _starts: tuple[int, int] = field(init=False, default=(0, 0))  # of the window in use, and of the next one
    _ends: list[int] = field(init=False, default_factory=list)  # of each window, in rows read
    _begun: int = field(init=False, default=-1)  # the last epoch whose first row was requested
    _ended: bool = field(init=False, default=False)  # whether that epoch had no row

    @property
    def n_windows(self) -> int:
        return self.max_updates

    @property
    def epochs(self) -> Iterator[int]:
        """The epochs, as long as they have rows. A stream that cannot be read again has one."""
        for epoch in range(self.n_epochs):
            if self._index == self.max_updates or not self._begins(epoch):
                return
            yield epoch

    def n_windows_of(self, epoch: int) -> int:
        return self._counts[epoch]

    def rows_after(self, n_windows: int) -> int:
        return self._ends[n_windows - 1] if n_windows else 0

    def epochs_after(self, n_windows: int) -> float:
        """Return the number of epochs that these windows are in, without a fraction."""
        ends = itertools.accumulate(self._counts[epoch] for epoch in range(self.n_epochs))
        return float(bisect_left(list(ends), n_windows) + 1) if n_windows else 0.0

    def ends_epoch(self, n_windows: int) -> bool:  # noqa: ARG002
        return False  # known only when the next row is requested

    def windows(self, epoch: int, start: int = 0) -> Iterator[Window]:
        # A stream gives its rows in order, so the rows of skipped windows must be read too.
        return (window for window in self._from_first(epoch) if window.index >= start)

    def _from_first(self, epoch: int) -> Iterator[Window]:
        while self._index < self.max_updates:
            wanted = self.batch_sizes.at(self._index).effective_batch_size - self._n_open
            if self._more(epoch, wanted) < wanted:
                break
            yield self._window(epoch)
        else:
            return
        is_last = self.remainder == "flush" or epoch + 1 == self.n_epochs
        if self._n_open and (is_last or not self._begins(epoch + 1)):
            yield self._window(epoch)

    def resume_after(self, done: Progress) -> tuple["StreamPlan", int]:
        """Return this plan, which reads the stream again from its beginning, and the epoch that continues.

        If `max_updates` ended the earlier run, its last epoch continues, if it turns out to have more rows.
        """
        was_cut = len(done.rows) == done.max_updates and len(done.rows) < self.n_windows
        return self, done.last_epoch if was_cut else max(self.n_epochs, done.last_epoch + 1)

    def shortfall(self) -> str | None:
        if self._index == self.max_updates:
            return None
        return (
            f"The stream ended after {self._index} updates, but `max_updates` is {self.max_updates}, for which the "
            "learning rate schedule was planned. If the stream can be read again, increase `n_epochs`."
        )

    def __str__(self) -> str:
        """Return the arithmetic of the run, as lines of text."""
        left = "make a smaller update" if self.remainder == "flush" else "are carried into the next epoch"
        passes = "1 pass" if self.n_epochs == 1 else f"{self.n_epochs} passes"
        return "\n".join(
            [
                "Training samples: a stream",
                *describe_sizes(self.batch_sizes, self.rate_scaling),
                f"Updates: {self.max_updates} (`max_updates`), or fewer if the stream ends first ({passes})",
                *([f"Updates per epoch: not known beforehand; rows left over {left}"] if self.n_epochs > 1 else []),
                *([f"Validation samples: {self.n_validation_rows}"] if self.n_validation_rows else []),
            ]
        )

    @property
    def _index(self) -> int:
        """The index of the next window."""
        return self._counts.total()

    @property
    def _n_open(self) -> int:
        """The number of rows that were read and are in no window yet."""
        return self._came - self._starts[1]

    def _begins(self, epoch: int) -> bool:
        """Return whether an epoch has a row, which is known only after reading it."""
        if self._begun < epoch:
            self._begun, self._ended = epoch, not self._more(epoch, 1)
        return not self._ended

    def _more(self, epoch: int, n: int) -> int:
        came = self.read(epoch, n, self._starts[0]) if n else 0
        self._came += came
        return came

    def _window(self, epoch: int) -> Window:
        window = Window(self._index, epoch, tuple(range(self._starts[1], self._came)))
        self._counts[epoch] += 1
        self._starts = self._starts[1], self._came
        self._ends.append(self._came)
        return window
