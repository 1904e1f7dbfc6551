"""The choice of rows to check, and to measure the loss on, before training."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..errors import DataError
from ..objective.item_counts import Batch, ItemCounter
from ..objective.sample import Evidence, Groups, RowGroup, Sample
from .batches import can_be_taken_apart, take, trimmed
from .collator import RowCollator
from .dataset import Rows
from .further_rows import further_rows
from .rare_rows import LabelKind, RareRows
from .row import class_of, length_of
from .short_rows import LONG_ENOUGH

_SAMPLE, _PROBE_ROWS = 32, 4
_TIMES_SHORTEST = 1.5  # a row that is at most so many times as long as the shortest is quick to measure, too
_STRIDE = 4  # of models that take tokens in groups
_GROUP, _GROUP_TOKENS = 7, 4096  # the most rare rows, and the most tokens, in one batch
_CLASSES = LabelKind()
_SHORTEST = 8  # the shortest rows, which are candidates besides the sample


def sample_positions(rows: Rows) -> list[int]:
    """Return up to 32 positions in ascending order.

    They are random, since rows may repeat with a period, but always the same.
    """
    return sorted(np.random.RandomState(0).permutation(len(rows))[:_SAMPLE].tolist())


def labelled_positions(rows: Rows, row_collator: RowCollator, ignore_index: int) -> list[int]:
    """Return the positions of rows with at least one label that counts.

    The candidates are the sample, the shortest rows and the longest one. If none of them has such a label, return the
    first row that has one. If the collator draws at random, return all candidates: it may give any row a label.

    Raises:
        DataError: if no row has a label that counts.
    """
    positions = sorted({*sample_positions(rows), *_extremes(rows)})
    if row_collator.draws:
        return positions
    item_counter = ItemCounter(ignore_index)
    found = [p for p in positions if item_counter.has_items(row_collator(rows, [p]))]
    if found:
        return found
    for position in range(len(rows)):
        if item_counter.has_items(row_collator(rows, [position])):
            return [position]
    raise DataError(
        f"{rows.describe_all} has no label that counts: all are {ignore_index}, which the loss ignores. Check how "
        f"the labels were made, and whether truncation removed them.{rows.if_none_is_fit}"
    )


def _extremes(rows: Rows) -> list[int]:
    lengths = rows.lengths()
    if lengths is None:
        return []
    everyone = range(len(rows))
    shortest = heapq.nsmallest(_SHORTEST, everyone, key=lengths.__getitem__)
    return [*shortest, max(everyone, key=lengths.__getitem__)]


def sample_of(
    rows: Rows,
    row_collator: RowCollator,
    candidates: Sequence[int],
    ignore_index: int,
    label_kind: LabelKind = _CLASSES,
) -> Sample:
    """Return a few labelled rows, in one batch and in separate ones, for the objective to measure its loss on.

    Raises:
        DataError: if the collator draws at random and its batches cannot be split into rows: what a row contributes
            then depends on the batch that it is in.
    """
    positions, longest = _unlike(rows, candidates)
    few = _batches(rows, row_collator, positions)
    if row_collator.draws and few.cut is None:
        raise DataError(
            "`data_collator` is random, so the rows of an update must be collated as one batch, which is then split "
            "into micro-batches. But some tensors of its batches do not have the rows along their first dimension. "
            "Return tensors whose first dimension is the number of rows."
        )

    rare = RareRows.of(rows, ignore_index, label_kind)

    def further(evidence: Sequence[Evidence]) -> list[RowGroup]:
        found = further_rows(rows, evidence, rare.positions)
        return _rare_groups(rows, row_collator, [*rare.positions[:1], *found])

    whole = Sample(
        row_collator.seeded(rows, [longest], 0),
        *few,
        names=[rows.name_of(position) for position in positions],
        rare=_rare_groups(rows, row_collator, rare.positions),
        not_looked_at=rare.not_looked_at,
        further=further,
    )
    short = row_collator.shortened(rows, positions)
    if short is None:
        return whole
    few = _batches(short, row_collator, range(len(short)))
    return replace(whole, short=replace(whole, together=few.together, cut=few.cut, collated=few.collated))


class _Batches(NamedTuple):
    """A few rows in one batch, and functions that split them: the fields of `Sample` with these names."""

    together: Batch
    cut: Callable[[Batch, Groups], Sequence[Batch]] | None
    collated: Callable[[Groups], Sequence[Batch]]


def _batches(rows: Rows, row_collator: RowCollator, positions: Sequence[int]) -> _Batches:
    def batch_of(chosen: Sequence[int]) -> Batch:
        return row_collator.seeded(rows, chosen, 0)  # one seed, so that rows that draw are the same each time

    def cut_to_fit(groups: Groups) -> list[Batch]:
        return [trimmed(take(together, group)) for group in groups]  # keeps the random numbers, as in a window

    together = batch_of(positions)
    in_rows = can_be_taken_apart(together, len(positions))
    return _Batches(
        together,
        (lambda batch, groups: [take(batch, group) for group in groups]) if in_rows else None,
        cut_to_fit if row_collator.draws else lambda groups: [batch_of([positions[n] for n in g]) for g in groups],
    )


def _rare_groups(rows: Rows, row_collator: RowCollator, chosen: Sequence[int]) -> list[RowGroup]:
    """Return rare rows in small groups that all begin with the common row, which is the first of those chosen."""
    groups: list[list[int]] = []
    for position, row in zip(chosen[1:], rows.fetch(chosen[1:]), strict=True):
        if not groups or len(groups[-1]) > min(_GROUP, _GROUP_TOKENS // (length_of(row) or 1)):
            groups.append([chosen[0]])
        groups[-1].append(position)
    return [_row_group(rows, row_collator, positions) for positions in groups]


def _row_group(rows: Rows, row_collator: RowCollator, positions: Sequence[int]) -> RowGroup:
    together = row_collator.seeded(rows, positions, 0)

    def collated(places: Sequence[int]) -> Batch:
        return row_collator.seeded(rows, [positions[n] for n in places], 0)

    def cut(places: Sequence[int]) -> Batch:
        return take(together, places)

    in_rows = can_be_taken_apart(together, len(positions))
    names = [rows.name_of(position) for position in positions]
    return RowGroup(together, cut if in_rows else collated, positions, names)


def _unlike(rows: Rows, candidates: Sequence[int]) -> tuple[list[int], int]:
    """Return four rows to measure a loss on, and the longest candidate.

    The four are the shortest row, the longest that is quick to measure, and two in between. These two have other
    classes, and lengths with other remainders modulo 4, if there are any: the more the rows differ, the more a
    measurement can find. (A model that takes tokens in fours may be sensitive to padding at other lengths only.)
    """
    fetched = rows.fetch(candidates)
    places, longest = unlike_places([length_of(row) for row in fetched], [class_of(row) for row in fetched])
    return [candidates[place] for place in places], candidates[longest]


def unlike_places(lengths: Sequence[int], classes: Sequence[int | None]) -> tuple[list[int], int]:
    """Return the places of four unlike rows, as `_unlike` chooses them, and of the longest row.

    Args:
        lengths: the length of each row.
        classes: the class of each row; None if it has none.
    """
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    longest = by_length[-1]
    quick = max(LONG_ENOUGH, _TIMES_SHORTEST * lengths[by_length[0]])
    n_quick = sum(length <= quick for length in lengths)
    by_length = by_length[: max(n_quick, _PROBE_ROWS)]
    n = min(_PROBE_ROWS, len(by_length))
    chosen = [by_length[i * (len(by_length) - 1) // max(1, n - 1)] for i in range(n)]
    kinds = {p: (classes[p], lengths[p] % _STRIDE) for p in by_length}
    for place in range(1, n - 1):
        others = [kinds[p] for i, p in enumerate(chosen) if i != place]
        taken, rests = {kind for kind, _ in others}, {rest for _, rest in others}
        chosen[place] = min(by_length, key=lambda p: (kinds[p][0] in taken, kinds[p][1] in rests, p != chosen[place]))
    # Copies of a row still help: they are measured with other labels, too.
    return (chosen * _PROBE_ROWS)[:_PROBE_ROWS], longest
