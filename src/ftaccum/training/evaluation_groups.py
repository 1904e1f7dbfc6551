"""The groups of rows on which a validation loss is computed, if it reads several rows together."""

from collections.abc import Iterator
from dataclasses import dataclass

from ..planning.micro_batches import RowIndices


@dataclass(frozen=True)
class EvaluationGroups:
    """Consecutive groups of the validation rows. The loss is the mean of theirs, weighted by their rows.

    A group has as many rows as an update, so that its loss can be compared with that of an update. The last group has
    the rows that are left.

    Attributes:
        n_rows: the number of validation rows.
        size: the number of rows of a group.
    """

    n_rows: int
    size: int

    def __iter__(self) -> Iterator[RowIndices]:
        for start in range(0, self.n_rows, self.size):
            yield tuple(range(start, min(start + self.size, self.n_rows)))

    def describe(self) -> str:
        """Return a line on how the validation loss is computed."""
        if self.n_rows < self.size:
            return f"Validation loss: the {self.n_rows} validation rows are one group, smaller than an update"
        left = self.n_rows % self.size
        last = f"; the last group has {left}" if left else ""
        return f"Validation loss: on groups of {self.size} rows, weighted by their rows{last}"
