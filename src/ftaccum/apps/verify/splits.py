"""The windows that are tried, and the ways in which they are cut. Pure integers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...planning.micro_batches import BatchLimits, MicroBatchPlanner, MicroBatchRows, RowIndices

ByProcess = Sequence[Sequence[MicroBatchRows]]
Cut = Callable[[RowIndices, MicroBatchPlanner], ByProcess]

_REMAINDERS = 4  # of whole micro-batches: of a large k, not all numbers from 1 to k - 1 are tried


@dataclass(frozen=True)
class Split:
    """One way to accumulate one window.

    Attributes:
        rows: of the window.
        by_process: its micro-batches, by process; all have equally many.
        at_one_width: whether rows are padded to the longest of the window instead of their micro-batch.
    """

    name: str
    rows: RowIndices
    by_process: ByProcess
    at_one_width: bool = False

    @property
    def slices(self) -> list[MicroBatchRows]:
        """Those of all processes, without the dummies."""
        return [piece for share in self.by_process for piece in share if piece.rows]

    @property
    def summary(self) -> tuple[str, int, int]:
        """What a table says of it: name, rows, passes of each process."""
        return self.name, len(self.rows), len(self.by_process[0])


def splits_of(
    window: RowIndices, cut: Cut, planner: MicroBatchPlanner, unit: int, n_random: int, seed: int
) -> Iterator[Split]:
    """A full window cut in many ways, and remainders of it.

    Args:
        cut: what cuts in training.
        planner: that of training.
        unit: rows that all processes take in at a time.
        n_random: cuts into random orders and sizes.
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
    """Any order, any sizes up to half the window, dealt to the processes as it comes."""
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
    """Rows of windows that are short: whole micro-batches, a last one that is not, and a single row, which leaves all
    processes but one without any."""
    whole = (n_rows - 1) // unit
    numbers = {round(n) for n in np.linspace(1, whole, min(_REMAINDERS, whole))} if whole else set()
    tried = {1, *(n * unit for n in numbers), whole * unit + (n_rows - whole * unit) // 2}
    return sorted(n for n in tried if 0 < n < n_rows)
