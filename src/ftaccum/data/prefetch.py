"""Load one window after the other on a process: ahead of time, and again if it must be split differently."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ..planning.base_plan import BasePlan, Window
from ..planning.halves import CutWindow, MeasuredWindows, split_halves
from ..planning.micro_batches import MicroBatchPlanner
from ..runtime.log import logger
from ..runtime.process_group import SINGLE, ProcessGroup
from ..tracking.work import Work
from .loader import Loader, LocalRows, MicroBatch


@dataclass(frozen=True)
class LocalWindow:
    """This process's micro-batches of a window.

    Attributes:
        planner: the planner that split the window.
        seed: the seed of its random numbers.
        n_first: the number of micro-batches in the first of two random halves; None if the window has no halves, and 0
            if this process cannot measure them.
    """

    window: Window
    planner: MicroBatchPlanner
    micro_batches: list[MicroBatch]
    n_first: int | None = None
    seed: tuple[int, ...] = (0,)

    @property
    def work(self) -> Work:
        """The numbers of tokens, positions and passes in it."""
        tokens, positions = (sum(getattr(m, name) for m in self.micro_batches) for name in ("tokens", "positions"))
        return Work(tokens, positions, len(self.micro_batches))


@dataclass
class WindowLoader:
    """The source of a process's windows.

    Attributes:
        planner: splits windows. It may be replaced between windows; those that were read ahead are then split again.
        process_group: the processes that must all have their part of a window before any of them uses it.
        measured: the windows whose rows are dealt into halves.
    """

    plan: BasePlan
    loader: Loader
    planner: MicroBatchPlanner
    process_group: ProcessGroup = SINGLE
    process_index: int = 0
    measured: MeasuredWindows = MeasuredWindows()

    def epoch(self, epoch: int, start: int = 0) -> "LocalWindows":
        """Return this process's windows of an epoch (from 0), without those whose index in the run is below `start`."""
        return LocalWindows(self, self._cut_as_it_comes(epoch, start))

    def again(self, local_window: LocalWindow) -> LocalWindow:
        """Return the same window, split by the current planner. All processes must call it."""
        return self.process_group.run_on_all(lambda: self.cut_anew(local_window))

    def counted_again(self, local_window: LocalWindow) -> LocalWindow:
        """Return the same window with its loss items counted again. All processes must call it.

        If rows have got or lost all their items, load the window again, because dummies stand in for rows without any.
        """
        counted = [self.loader.counted_again(micro) for micro in local_window.micro_batches]
        kept = [micro for micro in counted if micro is not None]
        if self.process_group.any(len(kept) < len(counted)):
            return self.again(local_window)
        return replace(local_window, micro_batches=kept)

    def cut_anew(self, local_window: LocalWindow) -> LocalWindow:
        """Do the same as `again`, but on this process alone."""
        share, planner = self._local_rows(local_window.window), self.planner
        (micro_batches,) = self.loader.load([share])
        return LocalWindow(local_window.window, planner, *_in_halves(micro_batches, share.n_first), share.seed)

    def _cut_as_it_comes(self, epoch: int, start: int) -> Iterator[LocalWindow]:
        # Workers take shares ahead of time, so each window is kept with the planner that split it.
        cut: list[tuple[Window, MicroBatchPlanner, LocalRows]] = []

        def shares() -> Iterator[LocalRows]:
            for window in self.plan.windows(epoch, start):
                share = self._local_rows(window)
                cut.append((window, self.planner, share))
                yield share

        for micro_batches in self.loader.load(shares(), ahead=True):
            window, planner, share = cut.pop(0)
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug(_describe_cut(window, micro_batches))
            yield LocalWindow(window, planner, *_in_halves(micro_batches, share.n_first), share.seed)

    def _local_rows(self, window: Window) -> LocalRows:
        cut = self._cut(window)
        return LocalRows(window.rows, cut.by_process[self.process_index], self._seed(window), cut.n_first)

    def _cut(self, window: Window) -> CutWindow:
        halves = self.measured.halves(window)
        if halves is None:
            return CutWindow(self.loader.cut(window.rows, self.planner))
        return split_halves(self.planner, window.rows, self.loader.widths(window.rows), halves)

    def _seed(self, window: Window) -> tuple[int, ...]:
        return self.plan.seed, window.index


def _in_halves(micro_batches: list[MicroBatch], n_first: int | None) -> tuple[list[MicroBatch], int | None]:
    """Return the micro-batches in the order to run them, and how many of them are in the first half.

    If only the first half has loss items, all dummies come first, and it cannot be measured. The last pass must not be
    over a dummy: its zero gradients would reach weights that no row uses.
    """
    if n_first is None or not all(micro.is_dummy for micro in micro_batches[n_first:]):
        return micro_batches, n_first
    if all(micro.is_dummy for micro in micro_batches):
        return micro_batches, n_first
    return sorted(micro_batches, key=lambda micro: not micro.is_dummy), 0


def _describe_cut(window: Window, micro_batches: list[MicroBatch]) -> str:
    cuts = ", ".join(
        "a dummy" if micro.is_dummy else f"{len(micro.slice.rows)} rows ({micro.positions} positions)"
        for micro in micro_batches
    )
    return f"Update {window.index + 1}: {len(window.rows)} rows; the main process's micro-batches have {cuts}."


@dataclass
class LocalWindows(Iterator[LocalWindow]):
    """Windows in order; the next one can be read while the device computes the current one."""

    window_loader: WindowLoader
    _coming: Iterator[LocalWindow]
    _read: list[LocalWindow | Exception] = field(default_factory=list)

    def read_ahead(self) -> None:
        """Load the next window now. If that fails, raise the error only when the window is asked for, which is after
        the current update."""
        try:
            self._read.append(next(self._coming))
        except Exception as error:  # StopIteration at the end of the epoch, too
            self._read.append(error)

    def __next__(self) -> LocalWindow:
        """Return the next window. Raise DataError on all processes if one of them cannot load its part."""
        local_window = self.window_loader.process_group.run_on_all(self._next)
        if local_window is None:
            raise StopIteration
        return local_window

    def _next(self) -> LocalWindow | None:
        if not self._read:
            self.read_ahead()
        local_window = self._read.pop()
        if isinstance(local_window, StopIteration):
            return None
        if isinstance(local_window, Exception):
            raise local_window
        # Processes read ahead unequally far, so some may have split this window by an older planner than others.
        return (
            local_window
            if local_window.planner == self.window_loader.planner
            else self.window_loader.cut_anew(local_window)
        )
