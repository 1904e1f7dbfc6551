"""The rows that are looked at before training."""

import heapq
from collections.abc import Sequence

import numpy as np

from ..errors import DataError
from ..objective.item_counts import Batch, ItemCounter
from ..objective.sample import Sample
from .batches import can_be_taken_apart, take
from .collator import RowCollator
from .dataset import Rows
from .row import class_of, length_of

_SAMPLE, _PROBE_ROWS = 32, 4


_LONG_ENOUGH = 64  # tokens, for rows to be unlike in length, or twice the shortest


_STRIDE = 4


_SHORTEST = 8  # rows to look at, so that some are short enough


def sample_positions(rows: Rows) -> list[int]:
    """Up to 32 positions, in ascending order: at random, since rows may repeat with a period, but always the same."""
    return sorted(np.random.RandomState(0).permutation(len(rows))[:_SAMPLE].tolist())


def labelled_positions(rows: Rows, row_collator: RowCollator, ignore_index: int) -> list[int]:
    """Positions of rows with at least one label that counts: those of the sample, a few shortest and the longest row;
    where none of these has one, the first such row. A collator that draws may give any row a label.

    Raises:
        DataError: where no row has one.
    """
    positions = sorted({*sample_positions(rows), *_extremes(rows)})
    if row_collator.draws:
        return positions
    item_counter = ItemCounter(ignore_index)
    found = [p for p in positions if _has_items(row_collator(rows, [p]), item_counter)]
    if found:
        return found
    for position in range(len(rows)):
        if _has_items(row_collator(rows, [position]), item_counter):
            return [position]
    raise DataError(
        f"{rows.describe_all} has no label that counts: all are {ignore_index}, which the loss leaves out. Check how "
        f"the labels were made, and that truncation leaves some.{rows.if_none_is_fit}"
    )


def _extremes(rows: Rows) -> list[int]:
    lengths = rows.lengths()
    if lengths is None:
        return []
    everyone = range(len(rows))
    shortest = heapq.nsmallest(_SHORTEST, everyone, key=lengths.__getitem__)
    return [*shortest, max(everyone, key=lengths.__getitem__)]


def sample_of(rows: Rows, row_collator: RowCollator, candidates: Sequence[int]) -> Sample:
    """A few labelled rows, together and apart, for the objective to measure its loss on.

    Raises:
        DataError: where the collator draws at random and its batches cannot be taken apart: then what a row
            contributes depends on the batch it is in.
    """
    positions, longest = _unlike(rows, candidates)

    def batch_of(chosen: Sequence[int]) -> Batch:
        return row_collator.seeded(rows, chosen, 0)  # rows that draw are to be the same rows each time

    together = batch_of(positions)
    in_rows = can_be_taken_apart(together, len(positions))
    if row_collator.draws and not in_rows:
        raise DataError(
            "`data_collator` draws at random, and gives batches whose tensors do not have the rows along their first "
            "dimension, so that no window can be drawn once and then cut. Give one tensor row for each row."
        )
    return Sample(
        batch_of([longest]),
        together,
        (lambda batch, groups: [take(batch, group) for group in groups]) if in_rows else None,
        None if row_collator.draws else lambda groups: [batch_of([positions[n] for n in g]) for g in groups],
        [rows.name_of(position) for position in positions],
    )


def _unlike(rows: Rows, candidates: Sequence[int]) -> tuple[list[int], int]:
    """The rows to measure a loss on, and the longest of all.

    The shortest, the longest that takes no time, and two between, of other classes, and of lengths that leave another
    rest when divided by 4: the more the groups differ, the more is told. (A model that takes tokens four by four may
    mind padding only where four are not whole.)
    """
    fetched = dict(zip(candidates, rows.fetch(candidates), strict=True))
    by_length = sorted(candidates, key=lambda position: length_of(fetched[position]))
    longest = by_length[-1]
    quick = max(_LONG_ENOUGH, 2 * length_of(fetched[by_length[0]]))
    n_quick = sum(length_of(fetched[p]) <= quick for p in by_length)
    by_length = by_length[: max(n_quick, _PROBE_ROWS)]
    n = min(_PROBE_ROWS, len(by_length))
    chosen = [by_length[i * (len(by_length) - 1) // max(1, n - 1)] for i in range(n)]
    kinds = {p: (class_of(fetched[p]), length_of(fetched[p]) % _STRIDE) for p in by_length}
    for place in range(1, n - 1):
        others = [kinds[p] for i, p in enumerate(chosen) if i != place]
        classes, rests = {kind for kind, _ in others}, {rest for _, rest in others}
        chosen[place] = min(by_length, key=lambda p: (kinds[p][0] in classes, kinds[p][1] in rests, p != chosen[place]))
    # With other labels, a row and its copies can still tell something.
    return (chosen * _PROBE_ROWS)[:_PROBE_ROWS], longest


def _has_items(batch: Batch, item_counter: ItemCounter) -> bool:
    count = item_counter.applicable(batch).get("labels")
    return count is None or bool(count(batch))
