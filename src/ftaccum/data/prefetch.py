"""One window after the other for one process, read ahead, and cut anew where it has to be."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..planning.course import Course, Window
from ..planning.micro_batches import Cutter
from ..tracking.throughput import Work
from .loader import Loader, MicroBatch, Share

# Comes to what a function comes to on this process, once it has come to something on all; or raises on all.
Together = Callable[[Callable[[], Any]], Any]


def _alone(make: Callable[[], Any]) -> Any:
    return make()


@dataclass(frozen=True)
class Portion:
    """This process's micro-batches of a window.

    Attributes:
        cutter: that the window was cut by.
    """

    window: Window
    cutter: Cutter
    micro_batches: list[MicroBatch]

    @property
    def work(self) -> Work:
        """What there is to do in it."""
        everything = Work(passes=len(self.micro_batches))
        for micro in self.micro_batches:
            everything.merge(Work(len(micro.slice.rows), micro.tokens, micro.positions))
        return everything


@dataclass
class Feed:
    """Where windows come from.

    Attributes:
        cutter: may be replaced between windows; those that were read ahead are cut anew.
        together: where processes agree on whether each of them has its part of a window.
    """

    plan: Course
    loader: Loader
    cutter: Cutter
    process_index: int = 0
    together: Together = _alone

    def epoch(self, epoch: int, start: int = 0) -> "Portions":
        """The portions of an epoch (from 0), without windows whose index in the run is below `start`."""
        return Portions(self, self._cut_as_it_comes(epoch, start))

    def again(self, portion: Portion) -> Portion:
        """The same window, cut by the cutter as it now is. All processes call it alike."""
        return self.together(lambda: self.cut_anew(portion))

    def cut_anew(self, portion: Portion) -> Portion:
        """What `again` does, on this process alone."""
        share, cutter = self._share(portion.window), self.cutter
        (micro_batches,) = self.loader.load([share])
        return Portion(portion.window, cutter, micro_batches)

    def _cut_as_it_comes(self, epoch: int, start: int) -> Iterator[Portion]:
        # Workers take shares earlier than these are asked for, so what each was cut by goes with it.
        cut: list[tuple[Window, Cutter]] = []

        def shares() -> Iterator[Share]:
            for window in self.plan.windows(epoch, start):
                cut.append((window, self.cutter))
                yield self._share(window)

        for micro_batches in self.loader.load(shares(), ahead=True):
            yield Portion(*cut.pop(0), micro_batches)

    def _share(self, window: Window) -> Share:
        slices = self.loader.cut(window.rows, self.cutter)[self.process_index]
        return Share(window.rows, slices, (self.plan.seed, window.index))


@dataclass
class Portions(Iterator[Portion]):
    """Portions in order; one can be read ahead while the device computes the one before."""

    feed: Feed
    _coming: Iterator[Portion]
    _read: list[Portion | Exception] = field(default_factory=list)

    def read_ahead(self) -> None:
        """Collates the next portion now. What goes wrong is raised when it is asked for: not before the update that
        is being computed is taken."""
        try:
            self._read.append(next(self._coming))
        except Exception as error:  # the end of the epoch, too
            self._read.append(error)

    def __next__(self) -> Portion:
        """Raises DataError on all processes, where one of them cannot have its portion."""
        portion = self.feed.together(self._next)
        if portion is None:
            raise StopIteration
        return portion

    def _next(self) -> Portion | None:
        if not self._read:
            self.read_ahead()
        portion = self._read.pop()
        if isinstance(portion, StopIteration):
            return None
        if isinstance(portion, Exception):
            raise portion
        # Processes read ahead unequally far: of what was learnt meanwhile, some cut by it and others did not.
        return portion if portion.cutter == self.feed.cutter else self.feed.cut_anew(portion)
