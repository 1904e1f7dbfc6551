"""Load a process's share of each window, as collated micro-batches with counted loss items."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
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
from .batches import can_be_taken_apart, take, token_counts, trimmed
from .collator import RowCollator
from .dataset import Rows
from .value_ranges import ValueRanges
from .workers import Workers, how_it_ended

_DEATHS = 3  # deaths of workers, with no window finished in between, that end the run
_DRAWS = 3  # tries with a collator that draws its labels, before the data count as having none


@dataclass(frozen=True)
class LocalRows:
    """The part of a window that one process works on, by position.

    Attributes:
        window: all rows of the window, on all processes.
        slices: the micro-batches of this process.
        seed: seeds the random numbers of the collator and the rows.
        n_first: the number of micro-batches in the first of two halves; None if there are no halves.
    """

    window: RowIndices
    slices: Sequence[MicroBatchRows]
    seed: tuple[int, ...]
    n_first: int | None = None


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward and backward pass.

    Attributes:
        batch: the collated batch, on the host.
        counts: the number of its loss items, by term.
        terms: the terms that `batch` has items of. A dummy replaces a micro-batch without any: its `batch` is a real
            row, but its `counts` are 0.
        slice: the rows of the micro-batch, also if a dummy replaces it.
        tokens, positions: the token positions of all texts of these rows, without and with padding; 0 if there are no
            tokens.
        names: how messages name the rows.
    """

    batch: Batch
    counts: Counts
    terms: tuple[str, ...]
    slice: MicroBatchRows
    tokens: int
    positions: int
    names: str = "these rows"

    @classmethod
    def of(cls, batch: Batch, counts: Counts, names: str = "these rows") -> "MicroBatch":
        """Return a collated batch, whose rows cannot be loaded again, as a micro-batch.

        Args:
            counts: the number of its loss items, by term.
        """
        return cls(batch, counts, _counted(counts), MicroBatchRows(), 0, 0, names)

    @property
    def is_dummy(self) -> bool:
        """Whether it must have no effect on gradients, random number generators and buffers."""
        return not any(self.counts.values())


class Loader:
    """A loader that makes micro-batches from the positions of rows.

    Attributes:
        by_window: whether the rows of a window are collated together and then split, because the collator draws at
            random or padding matters.
        knows_lengths: whether windows can be split by the lengths of their rows.
        repeats: whether the same rows and seed give the same batch again. They do not if the rows or the collator have
            their own generator: a resumed run then draws other numbers.
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
        dummy_candidates: the rows to try first as the dummy, before all others.
        num_workers: the number of processes that collate ahead; 0 for none.
        pin_memory: whether to put batches in pinned memory, from which a GPU copies without waiting.
        """
        self._rows, self._row_collator, self._objective, self._ranges = rows, row_collator, objective, ranges
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self._deaths = 0  # of workers, since the last finished window
        self.by_window = row_collator.draws or objective.padding_sensitive
        lengths = rows.lengths()
        self._has_lengths = lengths is not None
        self.knows_lengths = self._has_lengths and not objective.padding_sensitive
        self.repeats = row_collator.repeats
        # A dummy costs a forward and a backward pass, so a short row is best.
        self._dummy = self._find_dummy(
            sorted(dummy_candidates, key=lengths.__getitem__) if lengths else dummy_candidates
        )

    def cut(self, window: RowIndices, planner: MicroBatchPlanner) -> list[list[MicroBatchRows]]:
        """Return a window's micro-batches, by process. If padding matters, all rows are as wide as the longest."""
        return planner.split(window, self.widths(window))

    def widths(self, window: RowIndices) -> list[int] | None:
        """Return the positions that each row of a window takes in a batch; None if they are unknown."""
        known = self._rows.lengths(window) if self._has_lengths else None
        if known is None:
            return None
        lengths = [self._row_collator.width(length) for length in known]
        return lengths if self.knows_lengths else [max(lengths)] * len(lengths)

    def load(self, shares: Iterable[LocalRows], *, ahead: bool = False) -> Iterator[list[MicroBatch]]:
        """Yield the micro-batches of each share.

        A dummy replaces each micro-batch without rows or loss items. Dummies come first, in each half, so that the
        last pass is over the process's own rows, if it has any.

        Args:
            ahead: whether workers, if there are any, collate shares before they are asked for.

        Raises:
            DataError: if a row cannot be read, padded or used, naming it, or if workers die repeatedly.
        """
        taken, given = itertools.tee(shares)
        batches = self._collated(taken, ahead=ahead)
        for share in given:
            loaded = [self._or_dummy(micro) for micro in self._micro_batches(share, batches)]
            self._deaths = 0
            halves = loaded[: share.n_first or 0], loaded[share.n_first or 0 :]
            yield [micro for half in halves for micro in sorted(half, key=lambda micro: not micro.is_dummy)]

    def stream(self, shares: Iterable[LocalRows]) -> Iterator[MicroBatch]:
        """Yield the micro-batches of all shares one by one, without dummies: for evaluation, not for training."""
        for micro_batches in self.stream_shares(shares):
            yield from micro_batches

    def stream_shares(self, shares: Iterable[LocalRows]) -> Iterator[Iterator[MicroBatch]]:
        """Yield the same by share. Each share must be read to its end before the next one."""
        taken, given = itertools.tee(shares)
        batches = self._collated(taken, ahead=True)
        for share in given:
            yield self._micro_batches(share, batches)
            self._deaths = 0

    def name_of(self, position: int) -> str:
        """Return how messages name a row."""
        return f"{self._rows.name_of(position)} of `{self._rows.argument}`"

    def longest_rows(self, n_rows: int, *seed: int) -> MicroBatch:
        """Return a micro-batch of the longest rows, which needs the most memory of all with `n_rows` rows. If there are
        too few rows, repeat them; if lengths are unknown, take the first ones."""
        everyone, lengths = range(len(self._rows)), self._rows.lengths()
        by_length = everyone if lengths is None else sorted(everyone, key=lambda position: -lengths[position])
        rows = tuple(itertools.islice(itertools.cycle(by_length), n_rows))
        batch = self._row_collator.seeded(self._rows, rows, *seed)
        return self._micro_batch(batch, MicroBatchRows(rows))

    def _collated(self, shares: Iterable[LocalRows], *, ahead: bool) -> Iterator[Batch]:
        """Yield the batch of each micro-batch; or that of each window, if rows are collated by the window."""
        jobs = (job for share in shares for job in self._jobs(share))
        if not ahead or not self._num_workers:
            made = map(self._collate, jobs)
            yield from (recursively_apply(Tensor.pin_memory, batch) for batch in made) if self._pin_memory else made
            return
        # A worker's tensors are in shared memory. Each is an open file, and a process may have only about 1,000.
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
        # Each row has its own seed. The collator gets one too: it may draw for some rows only, none of them checked.
        return self._row_collator.seeded(self._rows, positions, *seed, positions[0], rows_seed=seed)

    def _worker_died(self, job: "_Job", exit_code: int) -> None:
        self._deaths += 1
        death = f"A worker process that was making a batch of `{self._rows.argument}` {how_it_ended(exit_code)}"
        if self._deaths == _DEATHS:
            raise DataError(
                f"{death}, and {_DEATHS - 1} others died before it without a complete update in between. The batch was "
                f"of {self._rows.names_of(job[0])}. If memory ran out, lower `num_workers` or free some. If shared "
                "memory ran out (SIGBUS), enlarge /dev/shm. Set `num_workers=0` to read the rows in the main process "
                "and see whether one of them crashes it."
            )
        logger.warning(f"{death}. New workers make the missing batches: no row is lost or repeated.")

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
                "The items that the loss is a mean over cannot be counted for "
                f"{self._rows.names_of(piece.rows)} of `{self._rows.argument}`: {error!r}. "
                "Check their labels, or `count_items`."
            ) from error
        names = f"{self._rows.names_of(piece.rows)} of `{self._rows.argument}`"
        return MicroBatch(batch, counts, _counted(counts), piece, *token_counts(batch), names)

    def counted_again(self, micro: MicroBatch) -> MicroBatch | None:
        """Return a micro-batch with its items counted again; None if it must be loaded again."""
        if micro.is_dummy:
            return None if micro.slice.rows else micro
        again = self._micro_batch(micro.batch, micro.slice)
        return None if again.is_dummy else again

    def halves(self, micro: MicroBatch) -> list[MicroBatch]:
        """Return the two halves of a micro-batch, at its width."""
        n_rows = len(micro.slice.rows)
        return [self._part(micro, part) for part in (range(n_rows // 2), range(n_rows // 2, n_rows))]

    def row_of(self, micro: MicroBatch, place: int) -> MicroBatch:
        """Return one row of a micro-batch as a micro-batch, at its width if the batch can be split into rows."""
        rows = micro.slice.rows
        if can_be_taken_apart(micro.batch, len(rows)):
            return self._part(micro, [place])
        return self._micro_batch(
            self._row_collator.seeded(self._rows, [rows[place]], 0), MicroBatchRows((rows[place],))
        )

    def _part(self, micro: MicroBatch, places: Sequence[int]) -> MicroBatch:
        rows, in_window = micro.slice.rows, micro.slice.places
        part = MicroBatchRows(
            tuple(rows[n] for n in places), places=tuple(in_window[n] for n in places) if in_window else ()
        )
        return self._micro_batch(take(micro.batch, places), part)

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
            f"{self._rows.describe_all} has no row that counts in the loss. Check its labels, or `count_items`."
            f"{self._rows.if_none_is_fit}"
        )


_Job = tuple[Sequence[int], tuple[int, ...]]  # positions to collate together, and the seed of their random numbers


def _counted(counts: Counts) -> tuple[str, ...]:
    return tuple(term for term, n in counts.items() if n)
