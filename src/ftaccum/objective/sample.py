"""The rows that a loss is measured on, together and apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .item_counts import Batch

Groups = Sequence[Sequence[int]]

# Four rows, apart: groups that differ in size tell ways to count apart. Batch norm cannot do with a single row.
SINGLE, UNEQUAL, PAIRS = ([0], [1]), ([0], [1], [2, 3]), ([0, 1], [2, 3])


@dataclass(frozen=True)
class RowGroup:
    """A few rows to measure a loss on; the first is a common one.

    Attributes:
        together: the rows as one batch.
        take: some of them, at the same width.
        positions: of the rows in the data.
        names: what to call each in a message.
    """

    together: Batch
    take: Callable[[Sequence[int]], Batch]
    positions: Sequence[int]
    names: Sequence[str]


@dataclass(frozen=True)
class Sample:
    """Four labelled rows to measure a loss on.

    Attributes:
        longest: the longest row of the data. It is run first, so that memory runs out before training.
        together: the four rows.
        cut: such a batch in groups of rows, at its width; None where that cannot be done.
        collated: the rows in groups that are padded by themselves.
        names: what to call each of the four in a message.
        rare: groups of rows that the four do not resemble.
        not_looked_at: the labels that none of these has, in words.
    """

    longest: Batch
    together: Batch
    cut: Callable[[Batch, Groups], Sequence[Batch]] | None
    collated: Callable[[Groups], Sequence[Batch]] | None
    names: Sequence[str] = ()
    rare: Sequence[RowGroup] = ()
    not_looked_at: str = ""

    def apart(self, batch: Batch, groups: Groups) -> Sequence[Batch]:
        """A batch of the four rows in groups, at its width if that can be done."""
        if self.cut is not None:
            return self.cut(batch, groups)
        assert self.collated is not None, "rows are apart in one way at least"
        return self.collated(groups)
