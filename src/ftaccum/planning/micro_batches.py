"""Cut a window's rows into micro-batches at the least cost, and deal them to the processes. Needs only lengths.

An update does not depend on how its window is cut into micro-batches. So each micro-batch can hold rows of similar
length, few long ones or many short ones, and the number of passes may vary from window to window.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

RowIndices: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class MicroBatchRows:
    """The rows of one micro-batch. A dummy micro-batch, which keeps a process in step with the others, has none.

    Attributes:
        rows: positions in the training rows.
        tokens: token positions in the batch, padding included.
        width: token positions per sequence of the batch. Attention costs tokens × width.
        places: positions of the rows in their window, which may contain a row twice.
    """

    rows: RowIndices = ()
    tokens: int = 0
    width: int = 0
    places: RowIndices = ()

    @classmethod
    def of(cls, window: RowIndices, places: RowIndices, tokens: int = 0, width: int = 0) -> "MicroBatchRows":
        """Return a micro-batch of the rows at the given places of a window."""
        return cls(tuple(window[place] for place in places), tokens, width, places)


@dataclass(frozen=True)
class BatchLimits:
    """The most that a micro-batch may hold. One row is always allowed, because it cannot be cut.

    Attributes:
        rows: number of rows; None for no limit.
        tokens: number of token positions, padding included; None for no limit.
    """

    rows: int | None
    tokens: int | None = None

    def of_tokens(self, tokens: int) -> "BatchLimits":
        """Return these limits, with the limit on tokens lowered to `tokens` if it is higher."""
        return replace(self, tokens=tokens if self.tokens is None else min(tokens, self.tokens))


@dataclass(frozen=True)
class CostModel:
    """The time of a forward and backward pass of n rows padded to width w, in any unit.

    It is `per_pass + per_token · n·w + per_square · n·w²`. The last term is for attention.
    """

    per_pass: float
    per_token: float
    per_square: float

    def of(self, tokens: Any, width: Any) -> Any:
        """Return the cost of one pass, or an array of costs for arrays."""
        return self.per_pass + self.per_token * tokens + self.per_square * tokens * width


# A first guess, in units of the time per token, until passes have been timed. The cheapest cut depends little on it.
DEFAULT_COSTS = CostModel(64.0, 1.0, 0.0005)


@dataclass(frozen=True)
class MicroBatchPlanner:
    """A planner that cuts windows into micro-batches and deals these to the processes.

    Attributes:
        limits: the most that a micro-batch may hold.
        costs: the cost of a pass, to find the cheapest cut; None to cut rows in their given order, with each
            micro-batch as full as the limits allow.
        num_processes: number of processes to deal to.
        packed: whether a micro-batch is one sequence of rows without padding, instead of one padded sequence per row.
        n_passes: number of passes on each process; None for as many as the cheapest cut has. Needs `costs`. No
            micro-batch is a dummy unless there are fewer rows than micro-batches.
    """

    limits: BatchLimits
    costs: CostModel | None = DEFAULT_COSTS
    num_processes: int = 1
    packed: bool = False
    n_passes: int | None = None

    def split(self, rows: RowIndices, lengths: Sequence[int] | None = None) -> list[list[MicroBatchRows]]:
        """Return the micro-batches of a window, as one list per process.

        All lists have the same length, so that processes make the same number of passes. A round is one pass on each
        process, and its rows have similar lengths. The round with the largest micro-batch comes first, so that it fails
        at once if it does not fit. The round with the smallest comes last, because its pass syncs the gradients.

        Args:
            rows: the rows of the window, in the order given by the seed.
            lengths: the lengths of these rows in tokens; None if unknown, in which case each row counts as one token.

        Raises:
            ValueError: if the rows do not fit into `n_passes` within the limits.
        """
        known = np.ones(len(rows), dtype=np.int64) if lengths is None else np.maximum(1, lengths)
        order = np.arange(len(rows)) if self.costs is None else np.argsort(-known, kind="stable")
        known = known[order]
        ends = self._ends(known)
        slices = [
            self._slice(rows, tuple(order[start:end].tolist()), known[start:end])
            for start, end in zip([0, *ends[:-1]], ends, strict=True)
        ]
        if self.n_passes is not None:
            slices.sort(key=lambda piece: -piece.tokens)  # neighbors in length may differ in size
        rounds = [slices[n : n + self.num_processes] for n in range(0, len(slices), self.num_processes)]
        rounds += [[]] * ((self.n_passes or 0) - len(rounds))
        rounds.sort(key=lambda slices: -max((piece.tokens for piece in slices), default=0))
        return self._dealt(rounds)

    def _ends(self, lengths: np.ndarray) -> list[int]:
        """Return where each micro-batch ends."""
        if self.costs is None:
            return self._fullest(lengths)
        if self.n_passes is None:
            return self._cheapest(lengths, self.costs)
        return self._cheapest_of(min(len(lengths), self.n_passes * self.num_processes), lengths, self.costs)

    def _slice(self, window: RowIndices, places: RowIndices, lengths: np.ndarray) -> MicroBatchRows:
        tokens = int(self._tokens(lengths)[-1])
        width = tokens if self.packed else int(lengths.max())
        return MicroBatchRows.of(window, places, tokens, width)

    def _tokens(self, lengths: np.ndarray) -> np.ndarray:
        """Return the tokens of a micro-batch of the first row, the first two rows, and so on, padding included."""
        if self.packed:
            return np.cumsum(lengths)
        return np.maximum.accumulate(lengths) * np.arange(1, len(lengths) + 1)

    def _fitting(self, lengths: np.ndarray) -> np.ndarray:
        """Return the same, but only for micro-batches within the limits. The first row always fits."""
        if self.limits.tokens is None:
            return self._tokens(lengths[: self.limits.rows])
        # An upper bound on the rows that fit, so that only a few rows of a large window are examined.
        rows = max(1, self.limits.tokens // int(lengths.min() if self.packed else lengths[0]))
        tokens = self._tokens(lengths[: rows if self.limits.rows is None else min(rows, self.limits.rows)])
        return tokens[: max(1, int(np.searchsorted(tokens, self.limits.tokens, side="right")))]

    def _fullest(self, lengths: np.ndarray) -> list[int]:
        """Return where each micro-batch ends if each is filled up to the limits before the next one begins."""
        ends = [0]
        while ends[-1] < len(lengths):
            ends.append(ends[-1] + len(self._fitting(lengths[ends[-1] :])))
        return ends[1:]

    def _cheapest(self, lengths: np.ndarray, costs: CostModel) -> list[int]:
        """Return where each micro-batch ends in the cheapest cut of rows sorted by length, by dynamic programming.

        Passes come in rounds of one per process, and a process without a micro-batch runs a dummy. So the least cost of
        the first n rows is stored separately for each number of passes modulo the number of processes.
        """
        n_rows, processes = len(lengths), self.num_processes
        least = np.full((n_rows + 1, processes), np.inf)  # [rows cut so far, passes so far modulo processes]
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

    def _cheapest_of(self, n_slices: int, lengths: np.ndarray, costs: CostModel) -> list[int]:
        """Return where each micro-batch ends in the cheapest cut of rows sorted by length into exactly `n_slices`.

        The least cost of the first rows in n + 1 micro-batches follows from that in n.
        """
        n_rows = len(lengths)
        last = self._costs_of_last(lengths, n_rows - n_slices + 1, costs)
        most = len(last)
        least = np.full((n_slices + 1, most + n_rows + 1), np.inf)  # [micro-batches, most + number of rows]
        least[0, most] = 0.0
        before = np.lib.stride_tricks.sliding_window_view(least, n_rows + 1, axis=1)  # the same, shifted as in `last`
        for n in range(n_slices):
            (before[n, :most] + last).min(axis=0, out=least[n + 1, most:])
        if np.isinf(least[-1, -1]):
            raise ValueError(f"{n_rows} rows do not fit into {n_slices} micro-batches within {self.limits}.")
        ends = [n_rows]
        for n in range(n_slices - 1, 0, -1):
            j = int(np.argmin(before[n, :most, ends[-1]] + last[:, ends[-1]]))
            ends.append(ends[-1] - most + j)
        return ends[::-1]

    def _costs_of_last(self, lengths: np.ndarray, most: int, costs: CostModel) -> np.ndarray:
        """Return the costs of micro-batches by [most - number of rows, end]; infinity if one exceeds the limits.

        `most` is the most rows in one, or fewer if the limits allow fewer.
        """
        n_rows = len(lengths)
        most_tokens = n_rows * int(lengths.max()) if self.limits.tokens is None else self.limits.tokens
        most = min(most, self.limits.rows or most, max(1, most_tokens // int(lengths.min())))
        sizes, ends = np.arange(most, 0, -1)[:, None], np.arange(n_rows + 1)
        starts = np.maximum(ends - sizes, 0)
        width = lengths[starts]
        sums = np.concatenate([[0], np.cumsum(lengths)])
        tokens = sums[ends] - sums[starts] if self.packed else width * sizes
        fits = (tokens <= most_tokens) | (sizes == 1)
        cost = np.where(fits, costs.of(tokens, tokens if self.packed else width), np.inf)
        return cost[int(fits.any(axis=1).argmax()) :]

    def _dealt(self, rounds: list[list[MicroBatchRows]]) -> list[list[MicroBatchRows]]:
        """Deal round by round, the largest micro-batch to the process with the fewest tokens so far."""
        shares: list[list[MicroBatchRows]] = [[] for _ in range(self.num_processes)]
        for slices in rounds:
            by_size = sorted(slices, key=lambda piece: -piece.tokens)
            dummies = [MicroBatchRows()] * (self.num_processes - len(slices))
            by_load = sorted(shares, key=lambda share: sum(piece.tokens for piece in share))
            for share, piece in zip(by_load, [*by_size, *dummies], strict=True):
                share.append(piece)
        return shares
