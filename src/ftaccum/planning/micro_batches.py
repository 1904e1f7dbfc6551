"""From a window's rows to every process's share of it: the cut that costs least. Pure integers.

An update does not depend on how its window is cut into micro-batches. So rows that are padded together can be of
similar length, few where they are long and many where they are short, and the number of passes may vary from window
to window.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

RowIndices: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class MicroBatchRows:
    """The rows of one micro-batch; none for a dummy, which keeps a process in step with the others.

    Attributes:
        rows: positions in the training rows.
        tokens: what they come to as a batch, padding included.
        width: of that batch; so attention costs tokens × width.
        places: of the rows in their window, which may have a row twice.
    """

    rows: RowIndices = ()
    tokens: int = 0
    width: int = 0
    places: RowIndices = ()

    @classmethod
    def of(cls, window: RowIndices, places: RowIndices, tokens: int = 0, width: int = 0) -> "MicroBatchRows":
        """Those rows of a window that stand at these places in it."""
        return cls(tuple(window[place] for place in places), tokens, width, places)


@dataclass(frozen=True)
class BatchLimits:
    """What a micro-batch may hold at most. One row is always allowed: it cannot be cut.

    Attributes:
        rows: None for any number of them.
        tokens: positions, padding included; None for any number of them.
    """

    rows: int | None
    tokens: int | None = None

    def of_tokens(self, tokens: int) -> "BatchLimits":
        """The same, with a cap on tokens at least as low as this."""
        return replace(self, tokens=tokens if self.tokens is None else min(tokens, self.tokens))


@dataclass(frozen=True)
class CostModel:
    """What a forward and backward pass of n rows, padded to width w, costs, in any unit of time:
    `per_pass + per_token · n·w + per_square · n·w²`. (The square is attention's.)
    """

    per_pass: float
    per_token: float
    per_square: float

    def of(self, tokens: Any, width: Any) -> Any:
        """The cost of one pass, or of each of an array of them."""
        return self.per_pass + self.per_token * tokens + self.per_square * tokens * width


# A first guess, in units of a token's time, until passes have been timed. The cheapest cut changes little with it.
DEFAULT_COSTS = CostModel(64.0, 1.0, 0.0005)


@dataclass(frozen=True)
class MicroBatchPlanner:
    """Cuts windows into micro-batches and deals these to the processes.

    Attributes:
        caps: what a micro-batch may hold.
        costs: what a pass costs, to find the cheapest cut by; None for slices in the order of arrival, as full as the
            caps allow.
        num_processes: to deal to.
        packed: whether rows lie one behind the other in a micro-batch, without padding, instead of side by side.
    """

    limits: BatchLimits
    costs: CostModel | None = DEFAULT_COSTS
    num_processes: int = 1
    packed: bool = False

    def split(self, rows: RowIndices, lengths: Sequence[int] | None = None) -> list[list[MicroBatchRows]]:
        """Return the micro-batches of a window, by process.

        All processes get equally many, so that they make the same number of passes. In each round of one pass a
        process, lengths are similar. The round with the largest micro-batch comes first, to fail at once where it
        does not fit; the one with the smallest last: the pass that gradients are synced in.

        Args:
            rows: of the window, in the order of the seed.
            lengths: of these rows, in tokens; None where they are unknown, and every row counts as one token.
        """
        known = np.ones(len(rows), dtype=np.int64) if lengths is None else np.maximum(1, lengths)
        order = np.arange(len(rows)) if self.costs is None else np.argsort(-known, kind="stable")
        known = known[order]
        ends = self._fullest(known) if self.costs is None else self._cheapest(known, self.costs)
        slices = [
            self._slice(rows, tuple(order[start:end].tolist()), known[start:end])
            for start, end in zip([0, *ends[:-1]], ends, strict=True)
        ]
        rounds = [slices[n : n + self.num_processes] for n in range(0, len(slices), self.num_processes)]
        rounds.sort(key=lambda slices: -max(piece.tokens for piece in slices))
        return self._dealt(rounds)

    def _slice(self, window: RowIndices, places: RowIndices, lengths: np.ndarray) -> MicroBatchRows:
        tokens = int(self._tokens(lengths)[-1])
        width = tokens if self.packed else int(lengths.max())
        return MicroBatchRows.of(window, places, tokens, width)

    def _tokens(self, lengths: np.ndarray) -> np.ndarray:
        """The tokens of a micro-batch of the first row, the first two, …, padding included."""
        if self.packed:
            return np.cumsum(lengths)
        return np.maximum.accumulate(lengths) * np.arange(1, len(lengths) + 1)

    def _fitting(self, lengths: np.ndarray) -> np.ndarray:
        """The same for those micro-batches that keep the caps."""
        if self.limits.tokens is None:
            return self._tokens(lengths[: self.limits.rows])
        # No more rows than there would be if all were as short as they can be: of a large window, few are looked at.
        rows = max(1, self.limits.tokens // int(lengths.min() if self.packed else lengths[0]))
        tokens = self._tokens(lengths[: rows if self.limits.rows is None else min(rows, self.limits.rows)])
        return tokens[: max(1, int(np.searchsorted(tokens, self.limits.tokens, side="right")))]

    def _fullest(self, lengths: np.ndarray) -> list[int]:
        """Where each micro-batch ends, when each is filled up to the caps before the next one is begun."""
        ends = [0]
        while ends[-1] < len(lengths):
            ends.append(ends[-1] + len(self._fitting(lengths[ends[-1] :])))
        return ends[1:]

    def _cheapest(self, lengths: np.ndarray, costs: CostModel) -> list[int]:
        """Where each micro-batch ends for the least cost over all, of rows sorted by length: dynamic programming.

        Passes come in rounds of one for each process, and a process without a micro-batch runs a dummy. So the least
        cost of the first n rows is kept apart for each number of passes modulo the processes.
        """
        n_rows, processes = len(lengths), self.num_processes
        least = np.full((n_rows + 1, processes), np.inf)  # [rows cut so far, passes so far modulo the processes]
        came_from = np.zeros((n_rows + 1, processes), dtype=np.int64)
        least[0, 0] = 0.0
        for start in range(n_rows):
            tokens = self._fitting(lengths[start:])
            cost = costs.of(tokens, tokens if self.packed else lengths[start])
            reached = cost[:, None] + np.roll(least[start], 1)
            ends = slice(start + 1, start + 1 + len(tokens))
            better = reached < least[ends]
            least[ends][better] = reached[better]
            came_from[ends][better] = start
        dummies = -np.arange(processes) % processes
        phase = int(np.argmin(least[n_rows] + dummies * costs.per_pass))
        ends_backwards, end = [], n_rows
        while end:
            ends_backwards.append(end)
            end, phase = int(came_from[end, phase]), (phase - 1) % processes
        return ends_backwards[::-1]

    def _dealt(self, rounds: list[list[MicroBatchRows]]) -> list[list[MicroBatchRows]]:
        """Round by round, the largest micro-batch to the process that has least so far."""
        shares: list[list[MicroBatchRows]] = [[] for _ in range(self.num_processes)]
        for slices in rounds:
            by_size = sorted(slices, key=lambda piece: -piece.tokens)
            dummies = [MicroBatchRows()] * (self.num_processes - len(slices))
            by_load = sorted(shares, key=lambda share: sum(piece.tokens for piece in share))
            for share, piece in zip(by_load, [*by_size, *dummies], strict=True):
                share.append(piece)
        return shares
