"""Samples of rows that can be loaded again, cut as the loop's planner cuts them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from ..data.loader import LocalRows, MicroBatch
from ..data.prefetch import LocalWindow, WindowLoader
from ..planning.base_plan import Window
from ..planning.micro_batches import MicroBatchRows, RowIndices
from .audit_sample import AuditedWindow, choose_part


@dataclass(frozen=True)
class AuditRows:
    """Rows to audit, cut into micro-batches: an `AuditSample`.

    Attributes:
        rows: the indices of the rows.
        by_process: the micro-batches of each process.
        seed: the seed for random draws of the rows and the collator.
        window_loader: cuts and loads the rows.
    """

    rows: RowIndices
    by_process: Sequence[Sequence[MicroBatchRows]]
    seed: tuple[int, ...]
    window_loader: WindowLoader

    @classmethod
    def of(cls, rows: RowIndices, window: Window, window_loader: WindowLoader) -> "AuditRows":
        """Cut rows of a window as training does."""
        by_process = window_loader.loader.cut(rows, window_loader.planner)
        return cls(rows, by_process, (window_loader.plan.seed, window.index), window_loader)

    @property
    def n_rows(self) -> int:
        return len(self.rows)

    @property
    def times_largest(self) -> int:
        sizes = [piece.tokens for share in self.by_process for piece in share]
        return -(-sum(sizes) // max(sizes))

    @property
    def is_packed(self) -> bool:
        return self.window_loader.planner.packed

    def load(self) -> list[MicroBatch]:
        share = self.by_process[self.window_loader.process_index]
        (micro_batches,) = self.window_loader.loader.load([LocalRows(self.rows, share, self.seed)])
        return micro_batches

    def in_one(self) -> "AuditRows":
        return replace(self, by_process=[[self._of(tuple(range(len(self.rows))))]])

    def cut_otherwise(self) -> "AuditRows":
        """Return the rows in order of arrival, in micro-batches of half the size, or of two rows if all have one."""
        planner = self.window_loader.planner
        largest = max(len(piece.rows) for share in self.by_process for piece in share)
        limits = replace(planner.limits, rows=2 if largest == 1 else largest // 2)
        by_process = self.window_loader.loader.cut(self.rows, replace(planner, limits=limits, costs=None))
        return replace(self, by_process=by_process)

    def reversed(self) -> "AuditRows":
        turned = [[self._of(piece.places[::-1]) for piece in share[::-1]] for share in self.by_process]
        return replace(self, by_process=turned)

    def _of(self, places: RowIndices) -> MicroBatchRows:
        return MicroBatchRows.of(self.rows, places)


def audited_window(local_window: LocalWindow, window_loader: WindowLoader) -> AuditedWindow:
    """Return a window of the training loop as audits see it."""
    window, micro_batches = local_window.window, local_window.micro_batches

    def take(most: int | None) -> AuditRows:
        if most is None:
            return AuditRows.of(window.rows, window, window_loader)
        own = [(micro.slice.rows, micro.batch) for micro in micro_batches if micro.slice.rows]
        rows = tuple(chain.from_iterable(choose_part(own, most, window_loader.process_group)))
        return AuditRows.of(rows, window, window_loader)

    return AuditedWindow(window.index + 1, window.epoch, micro_batches, take)
