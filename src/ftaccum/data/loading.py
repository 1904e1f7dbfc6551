"""A process's shares of windows, as collated and counted micro-batches."""

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import recursively_apply
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..cutting import Cutter, Slice
from ..cutting import Rows as Positions
from ..errors import DataError
from ..objective import Batch, Counts, Objective
from .checking import Ranges
from .collating import Collation, can_be_taken_apart, take, trimmed
from .rows import Rows

# Forked workers find rows and collators in memory, lambdas and all; elsewhere these must be picklable.
_FORK = "fork" if sys.platform == "linux" else None
_AHEAD = 16  # batches that each worker may have made before they are asked for
_DRAWS = 3  # of a collator that draws its labels, before a data set is said to have none


@dataclass(frozen=True)
class Share:
    """What of a window one process works on, by position.

    Attributes:
        window: all rows of the window, on all processes.
        slices: the micro-batches of this process.
        seed: settles the collator's draws.
    """

    window: Positions
    slices: Sequence[Slice]
    seed: tuple[int, ...]


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward and backward pass.

    Attributes:
        batch: collated, on the host.
        counts: its loss items by term.
        terms: the terms that `batch` has items of. A ghost stands in for a micro-batch without any: its `batch` is
            a real row, whose terms are counted 0 times.
        slice: the rows that it stands for.
        tokens, positions: of these rows, token positions without and with padding; 0 where there are no tokens.
    """

    batch: Batch
    counts: Counts
    terms: tuple[str, ...]
    slice: Slice
    tokens: int
    positions: int

    @property
    def is_ghost(self) -> bool:
        """Whether it must leave no trace: no gradient, no draw, no buffer moved."""
        return not any(self.counts.values())


class Loader:
    """Turns positions into micro-batches.

    Attributes:
        by_window: whether the rows of a window are collated together and then cut, because the collator draws at
            random or padding matters.
    """

    def __init__(
        self,
        rows: Rows,
        collation: Collation,
        objective: Objective,
        ranges: Ranges,
        ghost_candidates: Sequence[int] = (),
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Args:
        ghost_candidates: where to look first for a row with loss items; all others come after.
        num_workers: processes that collate ahead; 0 for none.
        pin_memory: whether batches are put where a GPU copies them from without waiting.
        """
        self._rows, self._collation, self._objective, self._ranges = rows, collation, objective, ranges
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self.by_window = collation.draws or objective.padding_sensitive
        lengths = rows.lengths()
        self._has_lengths = lengths is not None
        # A ghost costs a pass, so it had better be short.
        self._ghost = self._find_ghost(
            sorted(ghost_candidates, key=lengths.__getitem__) if lengths else ghost_candidates
        )

    @property
    def knows_lengths(self) -> bool:
        """Whether micro-batches can be cut by the lengths of their rows."""
        return self._has_lengths and not self._objective.padding_sensitive

    def cut(self, window: Positions, cutter: Cutter) -> list[list[Slice]]:
        """A window's micro-batches, by process. Where padding matters, all rows are as wide as the longest."""
        known = self._rows.lengths(window) if self._has_lengths else None
        if known is None:
            return cutter.shares(window)
        lengths = [self._collation.width(length) for length in known]
        return cutter.shares(window, lengths if self.knows_lengths else [max(lengths)] * len(lengths))

    def load(self, shares: Iterable[Share], seed: Sequence[int] | None = None) -> Iterator[list[MicroBatch]]:
        """Collates the micro-batches of each share. An empty one becomes a ghost, and so does one without loss items;
        ghosts come first, so that the last pass is one of the process's own rows, if it has any.

        Args:
            seed: for workers, which take shares before they are asked for, where there are any; None for none.

        Raises:
            DataError: naming a row that cannot be read, padded or used.
        """
        taken, given = itertools.tee(shares)
        batches = self._collated(taken, seed)
        for share in given:
            loaded = [self._or_ghost(micro) for micro in self._micro_batches(share, batches)]
            yield sorted(loaded, key=lambda micro: not micro.is_ghost)

    def stream(self, shares: Iterable[Share]) -> Iterator[MicroBatch]:
        """The same, one micro-batch after the other, and as they are: without ghosts, for looking and not learning."""
        taken, given = itertools.tee(shares)
        batches = self._collated(taken, (0,))
        for share in given:
            yield from self._micro_batches(share, batches)

    def name_of(self, position: int) -> str:
        """What to call a row in a message."""
        return f"{self._rows.name_of(position)} of `{self._rows.argument}`"

    def longest_rows(self, n_rows: int, *seed: int) -> MicroBatch:
        """A micro-batch of as many of the longest rows, or of the first ones where lengths are unknown, again and
        again where there are too few: the most that a micro-batch of as many rows can need."""
        everyone, lengths = range(len(self._rows)), self._rows.lengths()
        by_length = everyone if lengths is None else sorted(everyone, key=lambda position: -lengths[position])
        rows = tuple(itertools.islice(itertools.cycle(by_length), n_rows))
        batch = self._collation.seeded(self._rows, rows, *seed)
        return self._micro_batch(batch, Slice(rows))

    def _collated(self, shares: Iterable[Share], seed: Sequence[int] | None) -> Iterator[Batch]:
        """The batch of each micro-batch, or where rows are collated by the window, of each window."""
        num_workers = 0 if seed is None else self._num_workers
        jobs = (job for share in shares for job in self._jobs(share))
        batches = DataLoader(
            _Collating(self._rows, self._collation),
            batch_size=None,
            sampler=jobs,
            num_workers=num_workers,
            pin_memory=self._pin_memory,
            multiprocessing_context=_FORK if num_workers else None,
            prefetch_factor=_AHEAD if num_workers else None,
            generator=_generator(seed or ()),  # otherwise it draws from the one that dropout uses
        )
        for batch in batches:
            if isinstance(batch, _Fault):
                raise DataError(batch.sentence)
            # What a worker made lies in shared memory, an open file a tensor, of which a process has a thousand.
            yield recursively_apply(torch.clone, batch) if num_workers and not self._pin_memory else batch

    def _jobs(self, share: Share) -> Iterator["_Job"]:
        if not self.by_window:
            yield from ((piece.rows, ()) for piece in share.slices if piece.rows)
        elif any(piece.rows for piece in share.slices):
            yield share.window, share.seed

    def _micro_batches(self, share: Share, batches: Iterator[Batch]) -> Iterator[MicroBatch]:
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

    def _micro_batch(self, batch: Batch, piece: Slice) -> MicroBatch:
        self._ranges.check(batch, self._rows, piece.rows)
        counts = self._objective.count(batch)
        return MicroBatch(batch, counts, _counted(counts), piece, *_sizes(batch))

    def halves(self, micro: MicroBatch) -> list[MicroBatch]:
        """A micro-batch in two, at its width."""
        n_rows = len(micro.slice.rows)
        return [self._part(micro, part) for part in (range(n_rows // 2), range(n_rows // 2, n_rows))]

    def row_of(self, micro: MicroBatch, place: int) -> MicroBatch:
        """One row of a micro-batch by itself: at its width, where rows lie one beside the other in it."""
        rows = micro.slice.rows
        if can_be_taken_apart(micro.batch, len(rows)):
            return self._part(micro, [place])
        return self._micro_batch(self._collation(self._rows, [rows[place]]), Slice((rows[place],)))

    def _part(self, micro: MicroBatch, places: Sequence[int]) -> MicroBatch:
        rows = Slice(tuple(micro.slice.rows[n] for n in places))
        return self._micro_batch(take(micro.batch, places), rows)

    def _or_ghost(self, micro: MicroBatch) -> MicroBatch:
        if micro.terms:
            return micro
        batch, terms = self._ghost
        return replace(micro, batch=batch, terms=terms)

    def _find_ghost(self, candidates: Sequence[int]) -> tuple[Batch, tuple[str, ...]]:
        # It needs items: a mean over none is NaN, and 0 × NaN is NaN in the gradient.
        for draw in range(_DRAWS if self._collation.draws else 1):
            for position in [*candidates, *range(len(self._rows))]:
                batch = self._collation.seeded(self._rows, [position], position, draw)
                if terms := _counted(self._objective.count(batch)):
                    return batch, terms
        raise DataError(
            f"{self._rows.all_in_words} has no row with loss items. Check its labels, or `count_items`."
            f"{self._rows.if_none_is_fit}"
        )


_Job = tuple[Sequence[int], tuple[int, ...]]  # positions to collate together, and the seed of the draws, if any


@dataclass(frozen=True)
class _Fault:
    """What a worker hands back instead of raising: the sentence, without the worker's traceback around it."""

    sentence: str


class _Collating(Dataset[Any]):
    """Rows as DataLoader wants them: a job in, a batch out."""

    def __init__(self, rows: Rows, collation: Collation) -> None:
        self._rows, self._collation = rows, collation

    def __getitem__(self, job: _Job) -> Batch | _Fault:
        positions, seed = job
        try:
            if seed:
                return self._collation.seeded(self._rows, positions, *seed)
            return self._collation(self._rows, positions)
        except DataError as error:
            if get_worker_info() is None:
                raise
            return _Fault(str(error))


def _generator(seed: Sequence[int]) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))


def _counted(counts: Counts) -> tuple[str, ...]:
    return tuple(term for term, n in counts.items() if n)


def _sizes(batch: Batch) -> tuple[int, int]:
    """Tokens without and with padding."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor):
        return 0, 0
    mask = batch.get("attention_mask")
    return int(mask.sum()) if isinstance(mask, Tensor) and mask.shape == ids.shape else ids.numel(), ids.numel()
