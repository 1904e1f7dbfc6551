"""Deal the rows of a window into two random halves, which are cut and run one after the other. Needs no torch.

The gradients of two random halves measure how much of a gradient is noise. Two halves sorted by length would not: long
rows have other gradients than short ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .base_plan import Window
from .micro_batches import MicroBatchPlanner, MicroBatchRows, RowIndices

LEAST_ROWS = 16  # of a measured window; the bias of the estimate is about one divided by the rows
LEAST_MEASURED = 8  # measured windows before there is an estimate: with fewer, Student's interval is too wide
AUTO_EVERY = 10  # windows from one measurement to the next by default
AUTO_LEAST_WINDOWS = AUTO_EVERY * LEAST_MEASURED  # of a run that is measured by default
_STREAM = 0x9A1F  # keeps the random numbers apart from others with the same seed

Halves = tuple[RowIndices, RowIndices]


@dataclass(frozen=True)
class CutWindow:
    """The micro-batches of a window.

    Attributes:
        by_process: the micro-batches of each process.
        n_first: the number of micro-batches of each process that are in the first of two halves; None if the window is
            not dealt into halves.
    """

    by_process: list[list[MicroBatchRows]]
    n_first: int | None = None


@dataclass(frozen=True)
class MeasuredWindows:
    """The windows whose rows are dealt into halves: every few windows, by their index in the run.

    Attributes:
        every: the number of windows from one to the next; None for no window at all.
        seed: the seed of the run.
        reason: why no window is measured; empty if some are.
    """

    every: int | None = None
    seed: int = 0
    reason: str = ""

    def halves(self, window: Window) -> Halves | None:
        """Return the places of the rows in the two halves, in the order of the window; None if it is not measured."""
        n_rows = len(window.rows)
        if self.every is None or (window.index + 1) % self.every or n_rows < LEAST_ROWS:
            return None
        dealt = np.random.default_rng((self.seed, window.index, _STREAM)).permutation(n_rows)
        first, second = np.sort(dealt[: n_rows // 2]), np.sort(dealt[n_rows // 2 :])
        return tuple(first.tolist()), tuple(second.tolist())


def split_halves(
    planner: MicroBatchPlanner, rows: RowIndices, lengths: Sequence[int] | None, halves: Halves
) -> CutWindow:
    """Cut each half of a window as the planner cuts a window. Each process first has its part of the first half.

    Args:
        rows: the rows of the window.
        lengths: the lengths of these rows in tokens; None if unknown.
        halves: the places of the rows in the two halves.
    """
    cut = []
    for places in halves:
        known = None if lengths is None else [lengths[place] for place in places]
        shares = planner.split(tuple(rows[place] for place in places), known)
        cut.append([[_in_window(piece, places) for piece in share] for share in shares])
    by_process = [[*first, *second] for first, second in zip(*cut, strict=True)]
    return CutWindow(by_process, len(cut[0][0]))


def _in_window(piece: MicroBatchRows, places: RowIndices) -> MicroBatchRows:
    """Return a micro-batch of a half with the places that its rows have in the window."""
    return replace(piece, places=tuple(places[place] for place in piece.places))
