"""Samples of rows that can be loaded again, cut as the loop's planner cuts them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from ..data.batches import can_be_taken_apart, take
from ..data.loader import LocalRows, MicroBatch
from ..data.prefetch import LocalWindow, WindowLoader
from ..objective.item_counts import Batch
from ..objective.normalizer import Counts
from ..planning.audit_schedule import AuditSize
from ..planning.base_plan import Window
from ..planning.micro_batches import MicroBatchRows, RowIndices
from .audit_sample import AuditedWindow, Piece, choose_part

_CANDIDATES = 4  # micro-batches from which an audit of a few rows takes its rows
_LARGEST = 3  # rows in its largest micro-batch


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

    @classmethod
    def few(
        cls,
        own: Sequence[MicroBatch],
        window: Window,
        window_loader: WindowLoader,
        has_items: Callable[[Batch], bool],
    ) -> "AuditRows":
        """Take a few short rows of a window, in two micro-batches of unequal size where the limits allow that.

        One of the rows has no loss items, if there is such a row. All processes must call it.

        Args:
            own: this process's micro-batches, without dummies.
            has_items: returns whether a batch has loss items.
        """
        process_group, planner, loader = window_loader.process_group, window_loader.planner, window_loader.loader
        candidates = set(choose_part(_pieces(own), _CANDIDATES, process_group))
        rows = [row for micro in own if micro.slice.rows in candidates for row in _single_rows(micro)]
        empty = choose_part([row for row in rows if not has_items(row.batch)], 1, process_group)
        most = min(_LARGEST, planner.limits.rows or _LARGEST)
        counted = [row for row in rows if has_items(row.batch)]
        with_items = choose_part(counted, most + 1 - len(empty) if most > 1 else 2, process_group)
        if len(with_items) < 2:
            return cls.of(window.rows, window, window_loader)
        # A row without loss items comes first, into the large micro-batch: both micro-batches must have some.
        chosen = _rows_of([*empty, *with_items] if most > 1 else with_items)
        limits = replace(planner.limits, rows=min(most, len(chosen) - 1))
        by_process = loader.cut(chosen, replace(planner, limits=limits, costs=None, n_passes=None))
        return cls(chosen, by_process, (window_loader.plan.seed, window.index), window_loader)

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

    def cut_differently(self) -> "AuditRows":
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


def audited_window(
    local_window: LocalWindow, window_loader: WindowLoader, count: Callable[[Batch], Counts]
) -> AuditedWindow:
    """Return a window of the training loop as audits see it.

    Args:
        count: counts the loss items of a batch.
    """
    window = local_window.window
    own = [micro for micro in local_window.micro_batches if not micro.is_dummy]

    def has_items(batch: Batch) -> bool:
        try:
            return any(count(batch).values())
        except Exception:  # `count_items` may only know batches as the collator makes them
            return True

    def sample(size: AuditSize) -> AuditRows:
        if size is AuditSize.FEW_ROWS:
            return AuditRows.few(own, window, window_loader, has_items)
        return AuditRows.of(window.rows, window, window_loader)

    return AuditedWindow(window.index + 1, window.epoch, local_window.micro_batches, sample)


def _pieces(micro_batches: Sequence[MicroBatch]) -> list[Piece[RowIndices]]:
    return [Piece(micro.slice.rows, micro.batch, micro.slice.tokens) for micro in micro_batches]


def _single_rows(micro: MicroBatch) -> list[Piece[RowIndices]]:
    """Return the rows of a micro-batch as pieces; a packed batch, or one of another form, is a piece as a whole."""
    rows = micro.slice.rows
    if not can_be_taken_apart(micro.batch, len(rows)):
        return [Piece((row,), micro.batch, micro.slice.width) for row in rows]
    return [Piece((row,), take(micro.batch, [n]), micro.slice.width) for n, row in enumerate(rows)]


def _rows_of(names: Iterable[RowIndices]) -> RowIndices:
    return tuple(chain.from_iterable(names))
