"""The windows of a run on a stream, whose rows are counted as they come."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from .base_plan import BasePlan, Progress, Window, describe_sizes
from .batch_size import BatchSizes

# Of an epoch, reads up to so many rows more, and says how many came: fewer only where the epoch has ended. Rows before
# the position that it is given last are not needed any more.
Read = Callable[[int, int, int], int]


@dataclass
class StreamPlan(BasePlan):
    """Windows as a stream gives them: the next so many rows make the next one.

    A position is the place of a row among all that came, over all epochs. What is left of an epoch becomes a window
    ("flush") or is filled up from the next one ("carry"). It is gone through once: each epoch in turn, each window in
    turn, and while one is read the one before it may still be in work.

    Attributes:
        n_epochs: passes over the stream, at most.
        max_updates: windows, at most; the schedule counts on so many.
        read: where rows come from.
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
    _counts: Counter[int] = field(init=False, default_factory=Counter)  # windows by epoch
    _came: int = field(init=False, default=0)
    _starts: tuple[int, int] = field(init=False, default=(0, 0))  # of the window in work, and of the next one
    _ends: list[int] = field(init=False, default_factory=list)  # of each window, in rows that came
    _begun: int = field(init=False, default=-1)  # the last epoch whose first row was asked for
    _ended: bool = field(init=False, default=False)  # that epoch had none

    @property
    def n_windows(self) -> int:
        return self.max_updates

    @property
    def epochs(self) -> Iterator[int]:
        """As long as there is something to train on: a stream that cannot be gone through again has one."""
        for epoch in range(self.n_epochs):
            if self._index == self.max_updates or not self._begins(epoch):
                return
            yield epoch

    def n_windows_of(self, epoch: int) -> int:
        return self._counts[epoch]

    def rows_after(self, n_windows: int) -> int:
        return self._ends[n_windows - 1] if n_windows else 0

    def ends_epoch(self, n_windows: int) -> bool:  # noqa: ARG002
        return False  # that shows when the next row is asked for

    def windows(self, epoch: int, start: int = 0) -> Iterator[Window]:
        # Rows of a stream are there after those before them: what is passed over is read, too.
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
        """Return this plan: the stream is read again from its beginning. Where `max_updates` had ended the run, its
        last epoch continues if the stream has more rows, which shows when it is read."""
        was_cut = len(done.rows) == done.max_updates and len(done.rows) < self.n_windows
        return self, done.last_epoch if was_cut else max(self.n_epochs, done.last_epoch + 1)

    def shortfall(self) -> str | None:
        if self._index == self.max_updates:
            return None
        return (
            f"The stream ended after {self._index} updates, before `max_updates`, {self.max_updates}, which the "
            "learning rate's schedule counted on. More passes (`n_epochs`) give more, if it can be gone through again."
        )

    def __str__(self) -> str:
        """The arithmetic of the run, as a paragraph."""
        left = "is flushed" if self.remainder == "flush" else "is carried into the next"
        passes = "1 pass" if self.n_epochs == 1 else f"{self.n_epochs} passes"
        return "\n".join(
            [
                "Training samples: a stream",
                *describe_sizes(self.batch_sizes, self.rate_scaling),
                f"Updates: {self.max_updates} (`max_updates`), or as many as {passes} over the stream give",
                *([f"Updates per epoch: as they come; what is left of one {left}"] if self.n_epochs > 1 else []),
                *([f"Validation samples: {self.n_validation_rows}"] if self.n_validation_rows else []),
            ]
        )

    @property
    def _index(self) -> int:
        """Of the next window."""
        return self._counts.total()

    @property
    def _n_open(self) -> int:
        """Rows that came and are in no window yet."""
        return self._came - self._starts[1]

    def _begins(self, epoch: int) -> bool:
        """Whether an epoch has a row, which nobody can tell before it is read."""
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
