"""The rows of an audit, and the ways to cut them into micro-batches."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from ..data.loader import MicroBatch
from ..data.novelty import kinds_of
from ..data.prefetch import LocalWindow, WindowLoader
from ..planning.base_plan import Window
from ..planning.micro_batches import MicroBatchRows, RowIndices
from ..runtime.process_group import ProcessGroup

_PART = 4  # micro-batches in the first audit


@dataclass(frozen=True)
class AuditRows:
    """Rows to audit, cut into micro-batches.

    Attributes:
        rows: the indices of the rows.
        by_process: the micro-batches of each process.
        seed: the seed for random draws of the rows and the collator.
    """

    rows: RowIndices
    by_process: Sequence[Sequence[MicroBatchRows]]
    seed: tuple[int, ...]

    @classmethod
    def of(cls, rows: RowIndices, window: Window, window_loader: WindowLoader) -> "AuditRows":
        """Cut rows of a window as training does."""
        by_process = window_loader.loader.cut(rows, window_loader.planner)
        return cls(rows, by_process, (window_loader.plan.seed, window.index))

    @property
    def times_largest(self) -> int:
        """The total size of all micro-batches, in multiples of the largest one, rounded up."""
        sizes = [piece.tokens for share in self.by_process for piece in share]
        return -(-sum(sizes) // max(sizes))

    def cut_otherwise(self, window_loader: WindowLoader) -> "AuditRows":
        """Return the rows in order of arrival, in micro-batches of half the size, or of two rows if all have one."""
        largest = max(len(piece.rows) for share in self.by_process for piece in share)
        limits = replace(window_loader.planner.limits, rows=2 if largest == 1 else largest // 2)
        planner = replace(window_loader.planner, limits=limits, costs=None)
        return replace(self, by_process=window_loader.loader.cut(self.rows, planner))

    def reversed(self) -> "AuditRows":
        """Return the same micro-batches in reverse order, with their rows in reverse order."""
        turned = [[self._of(piece.places[::-1]) for piece in share[::-1]] for share in self.by_process]
        return replace(self, by_process=turned)

    def in_one(self) -> "AuditRows":
        """Return all rows in one micro-batch of the main process."""
        return replace(self, by_process=[[self._of(tuple(range(len(self.rows))))]])

    def _of(self, places: RowIndices) -> MicroBatchRows:
        return MicroBatchRows.of(self.rows, places)


def part_of(local_window: LocalWindow, process_group: ProcessGroup) -> RowIndices:
    """Return the rows of up to four micro-batches from all processes.

    Two have the rarest labels and flags, two the most common ones: between similar micro-batches, wrong item counts
    would not show.
    """
    own = [(micro.slice.rows, _kinds_of(micro)) for micro in local_window.micro_batches if micro.slice.rows]
    pieces = list(chain.from_iterable(process_group.gather(own)))
    n_with = Counter(chain.from_iterable(kinds for _, kinds in pieces))
    pieces.sort(key=lambda piece: -sum(1 / n_with[kind] for kind in piece[1]))
    chosen = pieces if len(pieces) <= _PART else [*pieces[: _PART // 2], *pieces[-_PART // 2 :]]
    return tuple(chain.from_iterable(rows for rows, _ in chosen))


def _kinds_of(micro: MicroBatch) -> list[tuple[str, Any]]:
    """Return (column, value) pairs of labels, flags and similar columns."""
    return [(name, value) for name, kinds in kinds_of(micro.batch).items() for value in kinds.values]
