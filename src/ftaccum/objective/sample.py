"""The rows on which a loss is measured, in one batch and in separate batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .item_counts import Batch

Groups = Sequence[Sequence[int]]
Evidence = tuple[str, Sequence[float]]  # a column of a batch, and values in it by which a rule counts items differently

# Groups of four rows. Unequal sizes show which way to count is right. Batch norm needs more than a single row.
SINGLE, UNEQUAL, PAIRS = ([0], [1]), ([0], [1], [2, 3]), ([0, 1], [2, 3])
REVERSED = (3, 2, 1, 0)


@dataclass(frozen=True)
class RowGroup:
    """A few rows to measure a loss on; the first is a common one.

    Attributes:
        together: the rows as one batch.
        take: returns some of them as a batch of the same width.
        positions: the positions of the rows in the data.
        names: the name of each row in messages.
    """

    together: Batch
    take: Callable[[Sequence[int]], Batch]
    positions: Sequence[int]
    names: Sequence[str]


@dataclass(frozen=True)
class Sample:
    """Four labelled rows to measure a loss on.

    Attributes:
        longest: the longest row of the data. It runs first, so that a lack of memory shows before training.
        together: the four rows as one batch.
        cut: splits such a batch into groups of rows of its width; None if that is impossible.
        collated: returns the four rows in groups, each padded to its own width.
        names: the name of each of the four rows in messages.
        rare: groups of rows with values that the four lack.
        not_looked_at: the labels that none of these rows has, for a message.
        further: given the evidence of several rules, returns groups of other rows that have these values, first those
            with the values of few rules.
        short: the same sample with the four rows cut to a few tokens; None if they are short, or must stay whole. The
            longest and the rare rows are whole in both.
    """

    longest: Batch
    together: Batch
    cut: Callable[[Batch, Groups], Sequence[Batch]] | None
    collated: Callable[[Groups], Sequence[Batch]] | None
    names: Sequence[str] = ()
    rare: Sequence[RowGroup] = ()
    not_looked_at: str = ""
    further: Callable[[Sequence[Evidence]], Sequence[RowGroup]] = lambda _: ()
    short: "Sample | None" = None

    def separate(self, batch: Batch, groups: Groups = UNEQUAL) -> Sequence[Batch]:
        """Return a batch of the four rows in groups, at the width of the batch if possible."""
        if self.cut is not None:
            return self.cut(batch, groups)
        assert self.collated is not None, "`cut` or `collated` is given"
        return self.collated(groups)

    @property
    def own_width(self) -> Sequence[Batch]:
        """The four rows in groups of unequal size, each padded to its own width; empty if that is impossible."""
        return [] if self.collated is None else self.collated(UNEQUAL)

    @property
    def parts(self) -> Sequence[Batch]:
        """The four rows in groups of unequal size, each padded to its own width if possible."""
        return self.own_width or self.separate(self.together)

    @property
    def reordered(self) -> Batch | None:
        """The four rows in reverse order as one batch; None if their order is fixed."""
        return None if self.cut is None else self.cut(self.together, (REVERSED,))[0]
