"""Collate the rows at some positions into a batch, and name the row at fault if that fails."""

import itertools
from collections.abc import Callable, Mapping, Sequence

from ..errors import DataError
from ..objective.item_counts import Batch
from ..runtime.state_guards import Generators, preserve_rng, seed_all
from .batches import equal_batches, first_dimensions
from .dataset import Rows
from .padding import PaddingCollator
from .row import Row, length_of
from .short_rows import LONG_ENOUGH, SHORT
from .values import OddRowError, is_numeric

_FEW = 4

Collator = Callable[[list[Row]], Batch]


class RowCollator:
    """The user's collator or the padding one, applied to rows by position. Errors name the row at fault.

    Attributes:
        draws: whether the collator draws at random (masked LM). If so, rows must be collated a window at a time, so
            that the random numbers do not depend on how the window is split.
        repeats: whether rows and collator give the same batch again from the same seed. They do not if they have their
            own generator.
        width: returns the width of a batch, given the length of its longest row.
    """

    def __init__(self, collator: Collator, accepted: set[str] | None = None) -> None:
        """Args:
        collator: the user's collator, or the padding one.
        accepted: the columns that the model takes. If a row has any of them, its other columns are dropped unless they
            hold numbers: they could not become tensors.
        """
        self._collator = collator
        self._accepted = accepted or set()
        self.draws, self.repeats = False, True
        self._sound: list[Row] = []  # one row that is known to collate with others, if there is one
        self._has_a_row_each = False
        padding = collator if isinstance(collator, PaddingCollator) else None
        self.width: Callable[[int], int] = (lambda length: length) if padding is None else padding.width
        self._cut: Callable[[Row, int], Row | None] = (lambda *_: None) if padding is None else padding.cut

    def __call__(self, rows: Rows, positions: Sequence[int], seed: Sequence[int] = ()) -> Batch:
        """Collate the rows at these positions.

        Args:
            seed: seeds the random numbers of rows, if they draw any.

        Raises:
            DataError: naming the first row that cannot be collated with the others.
        """
        fetched = self._fetched(rows, positions, seed)
        try:
            batch = self._collator(fetched)
        except OddRowError as error:
            raise DataError(self._describe(rows, positions[error.place], error)) from error
        except Exception as error:
            raise DataError(self._explained(rows, positions, fetched, error)) from error
        if self._has_a_row_each and len(fetched) not in (sizes := first_dimensions(batch)):
            raise DataError(
                f"`data_collator` turned {len(fetched)} rows into a batch of {max(sizes, default=0)}, although it kept "
                f"all rows of another batch. The rows were {rows.names_of(positions)} of `{rows.argument}`. Make it "
                "keep every row, and remove unwanted rows from the data beforehand."
            )
        return batch

    def seeded(self, rows: Rows, positions: Sequence[int], *seed: int, rows_seed: Sequence[int] | None = None) -> Batch:
        """Collate with random numbers that follow the seed alone, and leave all generators unchanged.

        Args:
            rows_seed: the seed for rows, if it is not the collator's.
        """
        with preserve_rng():
            seed_all(*seed)
            return self(rows, positions, seed if rows_seed is None else rows_seed)

    def shortened(self, rows: Rows, positions: Sequence[int]) -> Rows | None:
        """Return the rows at these positions, cut to at most 18 tokens; None if they are short, or must stay whole."""
        whole = rows.fetch(positions)
        if self.draws or rows.draw or max(map(length_of, whole)) <= LONG_ENOUGH:
            return None
        cut = [self._cut(row, n) for row, n in zip(whole, itertools.cycle(SHORT))]
        return None if any(row is None for row in cut) else rows.subset(positions).replaced(cut)

    def find_draws(self, rows: Rows) -> None:
        """Find out from a few rows whether rows draw, whether the collator does, and whether one seed gives the same
        batch again."""
        rows.find_draws()
        positions = range(min(_FEW, len(rows)))
        one, again, other = (self.seeded(rows, positions, seed, rows_seed=(0,)) for seed in (1, 1, 2))
        self.repeats = equal_batches(one, again)
        if len(positions) > 1:
            self._sound = self._fetched(rows, positions[:1], (0,))
            self._has_a_row_each = len(positions) in first_dimensions(one)
        # Its random numbers may have no effect in most batches, so check the generators, too.
        self.draws = self._moves_generators(rows, positions) or not equal_batches(one, other)

    def _moves_generators(self, rows: Rows, positions: Sequence[int]) -> bool:
        with preserve_rng():
            before = Generators.now()
            self(rows, positions, (0,))  # fetching rows leaves them unchanged
            return not before.unchanged()

    def _fetched(self, rows: Rows, positions: Sequence[int], seed: Sequence[int]) -> list[Row]:
        return [self._without_texts(row) for row in rows.fetch(positions, seed)]

    def _without_texts(self, row: Row) -> Row:
        if not isinstance(row, Mapping) or not self._accepted & row.keys():
            return row
        return {key: value for key, value in row.items() if key in self._accepted or is_numeric(value)}

    def _explained(self, rows: Rows, positions: Sequence[int], fetched: list[Row], error: Exception) -> str:
        # Any of these may be the odd row. The one that the fewest rows fail with is sound.
        if found := [misfits for row in [*self._sound, *fetched[:_FEW]] if (misfits := self._misfits(row, fetched))]:
            misfits = min(found, key=len)
            first = min(misfits)
            return self._describe(rows, positions[first], _odd_row(first, misfits[first], fetched[first]))
        return (
            f"The {rows.names_of(positions)} of `{rows.argument}` cannot be collated together: {error}. "
            "Give a `data_collator` that can collate them."
        )

    @staticmethod
    def _describe(rows: Rows, position: int, odd: OddRowError) -> str:
        return f"In `{rows.argument}`, {rows.name_of(position)} cannot be batched: {odd}. {odd.remedy}"

    def _misfits(self, sound: Row, fetched: Sequence[Row]) -> dict[int, Exception]:
        """Return the errors of rows that cannot be collated alone or with a sound row, by place."""
        found: dict[int, Exception] = {}
        for n, row in enumerate(fetched):
            try:
                self._collator([row])
                self._collator([sound, row])
            except Exception as error:
                found[n] = error
        return found


def _odd_row(place: int, error: Exception, row: Row) -> OddRowError:
    """Return the error for a row that a collator could not collate."""
    if not (isinstance(error, KeyError) and isinstance(row, Mapping)):
        return OddRowError(place, str(error))
    problem = f"`data_collator` reads the column {error}, but the row has only {', '.join(map(repr, row))}"
    remedy = "With a `tokenizer`, rows of text are tokenized first: leave it out if `data_collator` tokenizes."
    return OddRowError(place, problem, remedy)
