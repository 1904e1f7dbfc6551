"""The updates after which a run is evaluated."""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class EvaluationSchedule:
    """A schedule of evaluations. It has no state, so that a resumed run continues it.

    Attributes:
        n_due: returns how many evaluations are due within the given number of first updates.
    """

    n_due: Callable[[int], int] = lambda _: 0

    @classmethod
    def every_updates(cls, n: int) -> "EvaluationSchedule":
        """Return a schedule with an evaluation every `n` updates."""
        return cls(lambda n_updates: n_updates // n)

    @classmethod
    def every_share(cls, share: float, n_rows: int, rows_after: Callable[[int], int]) -> "EvaluationSchedule":
        """Return a schedule with an evaluation every `share` of an epoch, after the first update that completes it.

        Args:
            share: from 0 (exclusive) to 1.
            n_rows: rows of an epoch.
            rows_after: returns the number of rows in a number of first updates.
        """
        rows = Fraction(str(share)) * n_rows  # 1/10 of the rows, unlike 0.1 as a float
        return cls(lambda n_updates: rows_after(n_updates) // rows)

    @classmethod
    def after_rows(cls, numbers: Iterable[int], rows_after: Callable[[int], int]) -> "EvaluationSchedule":
        """Return a schedule with an evaluation after the first update that reaches each of these numbers of rows."""
        wanted = sorted(numbers)
        return cls(lambda n_updates: bisect_right(wanted, rows_after(n_updates)))

    def is_due(self, n_updates: int, last: int) -> bool:
        """Return whether to evaluate after `n_updates` updates.

        Args:
            last: number of updates at the last evaluation; 0 for the one before training.
        """
        return self.n_due(n_updates) > self.n_due(last)
