"""A process's shares of windows, as collated and counted micro-batches."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate.utils import recursively_apply
from torch import Tensor

from ..errors import DataError, SettingsError
from ..objective.item_counts import Batch
from ..objective.normalizer import Counts
from ..objective.objective import Objective
from ..planning.micro_batches import MicroBatchPlanner, MicroBatchRows, RowIndices
from ..runtime.log import logger
from .batches import can_be_taken_apart, take, trimmed
from .collator import RowCollator
from .dataset import Rows
from .value_ranges import ValueRanges
from .workers import Workers, how_it_ended

_DEATHS = 3  # of workers, with no window between them, after which no more are started
_DRAWS = 3  # of a collator that draws its labels, before a data set is said to have none


@dataclass(frozen=True)
class LocalRows:
    """What of a window one process works on, by position.

    Attributes:
        window: all rows of the window, on all processes.
        slices: the micro-batches of this process.
        seed: settles what the collator and the rows draw.
    """

    window: RowIndices
    slices: Sequence[MicroBatchRows]
    seed: tuple[int, ...]


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward and backward pass.

    Attributes:
        batch: collated, on the host.
        counts: its loss items by term.
        terms: the terms that `batch` has items of. A dummy stands in for a micro-batch without any: its `batch` is
            a real row, whose terms are counted 0 times.
        slice: the rows that it stands for.
        tokens, positions: of these rows, token positions without and with padding; 0 where there are no tokens.
        names: what to call the rows in a message.
    """

    batch: Batch
    counts: Counts
    terms: tuple[str, ...]
    slice: MicroBatchRows
    tokens: int
    positions: int
    names: str = "these rows"

    @property
    def is_dummy(self) -> bool:
        """Whether it must leave no trace: no gradient, no draw, no buffer moved."""
        return not any(self.counts.values())


class Loader:
    """Turns positions into micro-batches.

    Attributes:
        by_window: whether the rows of a window are collated together and then cut, because the collator draws at
            random or padding matters.
        knows_lengths: whether micro-batches can be cut by the lengths of their rows.
        repeats: whether the same rows are the same batch again, from the same seed. Where they have a generator of
            their own, a run that is resumed draws otherwise.
    """

    def __init__(
        self,
        rows: Rows,
        row_collator: RowCollator,
        objective: Objective,
        ranges: ValueRanges,
        dummy_candidates: Sequence[int] = (),
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Args:
        dummy_candidates: where to look first for a row with loss items; all others come after.
        num_workers: processes that collate ahead; 0 for none.
        pin_memory: whether batches are put where a GPU copies them from without waiting.
        """
        self._rows, self._row_collator, self._objective, self._ranges = rows, row_collator, objective, ranges
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self._deaths = 0  # of workers, since a window was made
        self.by_window = row_collator.draws or objective.padding_sensitive
        lengths = rows.lengths()
        self._has_lengths = lengths is not None
        self.knows_lengths = self._has_lengths and not objective.padding_sensitive
        self.repeats = row_collator.repeats
        # A dummy costs a pass, so it had better be short.
        self._dummy = self._find_dummy(
            sorted(dummy_candidates, key=lengths.__getitem__) if lengths else dummy_candidates
        )

    def cut(self, window: RowIndices, planner: MicroBatchPlanner) -> list[list[MicroBatchRows]]:
        """A window's micro-batches, by process. Where padding matters, all rows are as wide as the longest."""
        known = self._rows.lengths(window) if self._has_lengths else None
        if known is None:
            return planner.split(window)
        lengths = [self._row_collator.width(length) for length in known]
        return planner.split(window, lengths if self.knows_lengths else [max(lengths)] * len(lengths))

    def load(self, shares: Iterable[LocalRows], *, ahead: bool = False) -> Iterator[list[MicroBatch]]:
        """Collates the micro-batches of each share. An empty one becomes a dummy, and so does one without loss items;
        dummies come first, so that the last pass is one of the process's own rows, if it has any.

        Args:
            ahead: whether workers, where there are any, take shares before they are asked for.

        Raises:
            DataError: naming a row that cannot be read, padded or used; or where workers die again and again.
        """
        taken, given = itertools.tee(shares)
        batches = self._collated(taken, ahead=ahead)
        for share in given:
            loaded = [self._or_dummy(micro) for micro in self._micro_batches(share, batches)]
            self._deaths = 0
            yield sorted(loaded, key=lambda micro: not micro.is_dummy)

    def stream(self, shares: Iterable[LocalRows]) -> Iterator[MicroBatch]:
        """The same, one micro-batch after the other, and as they are: without dummies, for looking and not learning."""
        taken, given = itertools.tee(shares)
        batches = self._collated(taken, ahead=True)
        for share in given:
            yield from self._micro_batches(share, batches)
            self._deaths = 0

    def name_of(self, position: int) -> str:
        """What to call a row in a message."""
        return f"{self._rows.name_of(position)} of `{self._rows.argument}`"

    def longest_rows(self, n_rows: int, *seed: int) -> MicroBatch:
        """A micro-batch of as many of the longest rows, or of the first ones where lengths are unknown, again and
        again where there are too few: the most that a micro-batch of as many rows can need."""
        everyone, lengths = range(len(self._rows)), self._rows.lengths()
        by_length = everyone if lengths is None else sorted(everyone, key=lambda position: -lengths[position])
        rows = tuple(itertools.islice(itertools.cycle(by_length), n_rows))
        batch = self._row_collator.seeded(self._rows, rows, *seed)
        return self._micro_batch(batch, MicroBatchRows(rows))

    def _collated(self, shares: Iterable[LocalRows], *, ahead: bool) -> Iterator[Batch]:
        """The batch of each micro-batch, or where rows are collated by the window, of each window."""
        jobs = (job for share in shares for job in self._jobs(share))
        if not ahead or not self._num_workers:
            made = map(self._collate, jobs)
            yield from (recursively_apply(Tensor.pin_memory, batch) for batch in made) if self._pin_memory else made
            return
        # What a worker made lies in shared memory, an open file a tensor, of which a process has a thousand.
        copied = Tensor.pin_memory if self._pin_memory else torch.clone
        workers = Workers(self._collate, jobs, self._num_workers, self._worker_died)
        try:
            yield from (recursively_apply(copied, batch) for batch in workers)
        finally:
            workers.end()

    def _jobs(self, share: LocalRows) -> Iterator["_Job"]:
        if not self.by_window:
            yield from ((piece.rows, share.seed) for piece in share.slices if piece.rows)
        elif any(piece.rows for piece in share.slices):
            yield share.window, share.seed

    def _collate(self, job: "_Job") -> Batch:
        positions, seed = job
        if self.by_window:
            return self._row_collator.seeded(self._rows, positions, *seed)
        # Rows draw from seeds of their own. A collator may draw for some rows only, and for none that were looked at.
        return self._row_collator.seeded(self._rows, positions, *seed, positions[0], rows_seed=seed)

    def _worker_died(self, job: "_Job", exit_code: int) -> None:
        self._deaths += 1
        death = f"A worker process, making a batch of `{self._rows.argument}`, {how_it_ended(exit_code)}"
        if self._deaths == _DEATHS:
            raise DataError(
                f"{death}, as {_DEATHS - 1} did before it, and none of them finished a window. The batch was to be of "
                f"{self._rows.names_of(job[0])}. Where memory ran out, lower `num_workers` or free some; where shared "
                "memory did (SIGBUS), have /dev/shm enlarged. `num_workers=0` makes batches without other processes, "
                "and shows what a row does to the one that reads it."
            )
        logger.warning(f"{death}. New ones make what is missing: no row is lost, and none comes twice.")

    def _micro_batches(self, share: LocalRows, batches: Iterator[Batch]) -> Iterator[MicroBatch]:
        if self.by_window and any(piece.rows for piece in share.slices):
            whole = next(batches)
        for piece in share.slices:
            if not piece.rows:
                yield MicroBatch(None, dict.fromkeys(self._objective.terms, 0), (), piece, 0, 0)
            elif self.by_window:
                part = take(whole, piece.places)
                yield self._micro_batch(part if self._objective.padding_sensitive else trimmed(part), piece)
            else:
                yield self._micro_batch(next(batches), piece)

    def _micro_batch(self, batch: Batch, piece: MicroBatchRows) -> MicroBatch:
        self._ranges.check(batch, self._rows, piece.rows)
        try:
            counts = self._objective.count(batch)
        except (DataError, SettingsError):
            raise
        except Exception as error:
            raise DataError(
                f"The loss items of {self._rows.names_of(piece.rows)} of `{self._rows.argument}` cannot be counted: "
                f"{error!r}. Check their labels, or `count_items`."
            ) from error
        names = f"{self._rows.names_of(piece.rows)} of `{self._rows.argument}`"
        return MicroBatch(batch, counts, _counted(counts), piece, *_sizes(batch), names)

    def halves(self, micro: MicroBatch) -> list[MicroBatch]:
        """A micro-batch in two, at its width."""
        n_rows = len(micro.slice.rows)
        return [self._part(micro, part) for part in (range(n_rows // 2), range(n_rows // 2, n_rows))]

    def row_of(self, micro: MicroBatch, place: int) -> MicroBatch:
        """One row of a micro-batch by itself: at its width, where rows lie one beside the other in it."""
        rows = micro.slice.rows
        if can_be_taken_apart(micro.batch, len(rows)):
            return self._part(micro, [place])
        return self._micro_batch(
            self._row_collator.seeded(self._rows, [rows[place]], 0), MicroBatchRows((rows[place],))
        )

    def _part(self, micro: MicroBatch, places: Sequence[int]) -> MicroBatch:
        rows = MicroBatchRows(tuple(micro.slice.rows[n] for n in places))
        return self._micro_batch(take(micro.batch, places), rows)

    def _or_dummy(self, micro: MicroBatch) -> MicroBatch:
        if micro.terms:
            return micro
        batch, terms = self._dummy
        return replace(micro, batch=batch, terms=terms)

    def _find_dummy(self, candidates: Sequence[int]) -> tuple[Batch, tuple[str, ...]]:
        # It needs items: a mean over none is NaN, and 0 × NaN is NaN in the gradient.
        for draw in range(_DRAWS if self._row_collator.draws else 1):
            for position in [*candidates, *range(len(self._rows))]:
                batch = self._row_collator.seeded(self._rows, [position], position, draw)
                if terms := _counted(self._objective.count(batch)):
                    return batch, terms
        raise DataError(
            f"{self._rows.describe_all} has no row with loss items. Check its labels, or `count_items`."
            f"{self._rows.if_none_is_fit}"
        )


_Job = tuple[Sequence[int], tuple[int, ...]]  # positions to collate together, and the seed of what is drawn


def _counted(counts: Counts) -> tuple[str, ...]:
    return tuple(term for term, n in counts.items() if n)


def _sizes(batch: Batch) -> tuple[int, int]:
    """Tokens without and with padding."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor):
        return 0, 0
    mask = batch.get("attention_mask")
    return int(mask.sum()) if isinstance(mask, Tensor) and mask.shape == ids.shape else ids.numel(), ids.numel()
