"""The interface of the rows that an audit takes from a window. Loops differ in how they can run rows again."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median_low
from typing import Any, Generic, Protocol, TypeVar

from ..data.loader import MicroBatch
from ..data.novelty import kinds_of
from ..objective.item_counts import Batch
from ..planning.audit_schedule import AuditSize
from ..runtime.process_group import ProcessGroup

T = TypeVar("T")
_CONTINUOUS = 0.9  # distinct values of a column per value; with more of them, they are measurements


class AuditSample(Protocol):
    """Rows to audit, cut into micro-batches on all processes.

    All processes call the methods in the same order, except for `load` and `reversed`, which do not communicate.
    """

    @property
    def n_rows(self) -> int:
        """The number of rows, on all processes."""

    @property
    def times_largest(self) -> int:
        """The size of all rows in one batch, in multiples of the largest micro-batch, rounded up."""

    @property
    def is_packed(self) -> bool:
        """Whether a micro-batch is one sequence of rows, so that one batch is a longer sequence."""

    def load(self) -> list[MicroBatch]:
        """Return this process's micro-batches, dummies included. Dummies come first."""

    def in_one(self) -> "AuditSample | None":
        """Return all rows in one micro-batch of the main process, or None there if they do not fit into one batch.

        Other processes must not load it.
        """

    def cut_differently(self) -> "AuditSample | None":
        """Return the rows in smaller micro-batches, or in larger ones if each has a single row; None on all processes
        if that is impossible."""

    def reversed(self) -> "AuditSample":
        """Return the same micro-batches in reverse order, with their rows in reverse order."""


@dataclass(frozen=True)
class AuditedWindow:
    """A window before its update, as audits see it.

    Attributes:
        update: the number of the update, from 1.
        epoch: the epoch that it belongs to.
        micro_batches: this process's micro-batches.
        take: returns the sample of an audit, or None if these rows cannot be audited. All processes must call it.
    """

    update: int
    epoch: int
    micro_batches: Sequence[MicroBatch]
    take: Callable[[AuditSize], AuditSample | None]


@dataclass(frozen=True)
class Piece(Generic[T]):
    """Rows of a window that an audit takes together: a micro-batch, or a single row.

    Attributes:
        name: identifies the piece on all processes.
        batch: the rows, collated.
        size: their size, such as the number of token positions.
    """

    name: T
    batch: Batch
    size: int


def choose_part(own: Sequence[Piece[T]], most: int, process_group: ProcessGroup) -> list[T]:
    """Choose a few pieces from all processes. All of them must call it.

    Half of them have the rarest labels and flags, half the most common ones: between similar pieces, wrong item counts
    would not show. A piece is as rare as its rarest value: a sum over its values would choose the longest texts.
    Columns of numbers that are nearly all different make no piece rarer than the others, and are left out. Of
    equally rare pieces, the first half takes those nearest to the median size, the other half the smallest, so that
    sizes differ.

    Args:
        own: the pieces of this process.
        most: the number of pieces to choose, if there are so many.

    Returns:
        The names of the chosen ones, the same on every process, the rarest first.
    """
    named = [(piece.name, _kinds_of(piece.batch), piece.size) for piece in own]
    pieces = list(chain.from_iterable(process_group.gather(named)))
    n_with = Counter(chain.from_iterable(kinds for _, kinds, _ in pieces))
    distinct, found = Counter(column for column, _ in n_with), Counter[str]()
    for (column, _), n in n_with.items():
        found[column] += n
    repeats = {column for column in distinct if distinct[column] <= _CONTINUOUS * found[column]}
    ranked = [
        (max((1 / n_with[kind] for kind in kinds if kind[0] in repeats), default=0.0), size, name)
        for name, kinds, size in pieces
    ]
    middle = median_low(size for _, size, _ in ranked) if ranked else 0
    ranked.sort(key=lambda piece: (-piece[0], abs(piece[1] - middle), piece[1]))
    if len(ranked) <= most:
        return [name for *_, name in ranked]
    n_rare = most // 2
    common = sorted(ranked[n_rare:], key=lambda piece: piece[:2])[: most - n_rare]
    return [name for *_, name in (*ranked[:n_rare], *reversed(common))]


def _kinds_of(batch: Batch) -> list[tuple[str, Any]]:
    """Return (column, value) pairs of labels, flags and similar columns."""
    return [(name, value) for name, kinds in kinds_of(batch).items() for value in kinds.values]
