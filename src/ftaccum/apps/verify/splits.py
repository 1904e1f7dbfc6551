"""The windows to verify, and the ways to split them into micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...planning.micro_batches import BatchLimits, MicroBatchPlanner, MicroBatchRows, RowIndices

ByProcess = Sequence[Sequence[MicroBatchRows]]
Cut = Callable[[RowIndices, MicroBatchPlanner], ByProcess]

_REMAINDERS = 4  # of whole micro-batches; if k is large, not all from 1 to k - 1 are tried


@dataclass(frozen=True)
class Split:
    """One way to accumulate one window.

    Attributes:
        name: the name in the table.
        rows: the positions of the window's rows.
        by_process: the micro-batches of each process. All processes have equally many.
        at_one_width: whether rows are padded to the longest row of the window instead of that of their micro-batch.
    """

    name: str
    rows: RowIndices
    by_process: ByProcess
    at_one_width: bool = False

    @property
    def slices(self) -> list[MicroBatchRows]:
        """The micro-batches of all processes, without dummies."""
        return [piece for share in self.by_process for piece in share if piece.rows]

    @property
    def summary(self) -> tuple[str, int, int]:
        """The name, the number of rows, and the number of passes of each process."""
        return self.name, len(self.rows), len(self.by_process[0])


def splits_of(
    window: RowIndices, cut: Cut, planner: MicroBatchPlanner, unit: int, n_random: int, seed: int
) -> Iterator[Split]:
    """Yield many splits of a full window, and of shorter windows of its first rows.

    Args:
        window: the positions of the rows of the full window.
        cut: the function that splits windows in training.
        planner: the planner of training.
        unit: number of rows of a micro-batch, summed over all processes.
        n_random: number of splits into random orders and sizes.
        seed: the seed of the random splits.
    """
    yield Split("as trained", window, cut(window, planner))
    in_order = cut(window, replace(planner, costs=None))
    if planner.costs is not None:
        yield Split("equal slices, in order of arrival", window, in_order)
    yield Split("one row at a time", window, cut(window, replace(planner, limits=BatchLimits(1), costs=None)))
    for number in range(n_random):
        draw = np.random.RandomState((seed, number))
        yield Split(f"random order and sizes, {number + 1}", window, _random(window, planner.num_processes, draw))
    yield Split("padded to the width of the window", window, in_order, at_one_width=True)
    for n_rows in _remainders(len(window), unit):
        yield Split(f"remainder of {n_rows}", window[:n_rows], cut(window[:n_rows], planner))


def _random(window: RowIndices, num_processes: int, draw: np.random.RandomState) -> ByProcess:
    """Split a window in random order into random sizes, up to half the window, and assign them to random processes."""
    order = draw.permutation(len(window)).tolist()
    slices = []
    while order:
        size = int(draw.randint(1, max(1, len(window) // 2) + 1))
        slices.append(MicroBatchRows.of(window, tuple(order[:size])))
        order = order[size:]
    shares: list[list[MicroBatchRows]] = [[] for _ in range(num_processes)]
    for piece in slices:
        shares[int(draw.randint(num_processes))].append(piece)
    passes = max(map(len, shares))
    return [share + [MicroBatchRows()] * (passes - len(share)) for share in shares]


def _remainders(n_rows: int, unit: int) -> list[int]:
    """Return the numbers of rows of short windows: whole micro-batches, an incomplete last one, and a single row, which
    leaves all processes but one without rows."""
    whole = (n_rows - 1) // unit
    numbers = {round(n) for n in np.linspace(1, whole, min(_REMAINDERS, whole))} if whole else set()
    tried = {1, *(n * unit for n in numbers), whole * unit + (n_rows - whole * unit) // 2}
    return sorted(n for n in tried if 0 < n < n_rows)
