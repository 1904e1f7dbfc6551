"""A process's share of a window, as collated and counted micro-batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..errors import DataError
from ..objective import Batch, Counts, Objective
from .checking import Ranges
from .collating import Collation, take
from .rows import Rows

_DRAWS = 3  # of a collator that draws its labels, before a data set is said to have none


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward and backward pass.

    Attributes:
        batch: collated, on the host.
        counts: its loss items by term.
        terms: the terms that `batch` has items of. A ghost stands in for a micro-batch without any: its `batch` is
            a real row, whose terms are counted 0 times.
        n_rows, tokens, positions: rows, and token positions without and with padding (0 where there are no tokens),
            of the rows that it stands for.
    """

    batch: Batch
    counts: Counts
    terms: tuple[str, ...]
    n_rows: int
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
        lengths: of the rows, to cut windows by; None where they are unknown, or would save no padding.
    """

    def __init__(
        self,
        rows: Rows,
        collation: Collation,
        objective: Objective,
        ranges: Ranges,
        ghost_candidates: Sequence[int] = (),
    ) -> None:
        """Args:
        ghost_candidates: where to look first for a row with loss items; all others come after.
        """
        self._rows, self._collation, self._objective, self._ranges = rows, collation, objective, ranges
        self.by_window = collation.draws or objective.padding_sensitive
        self._ghost = self._find_ghost(ghost_candidates)
        self.lengths = None if self.by_window else rows.lengths()

    def load(self, window: Sequence[int], share: Sequence[Sequence[int]], *seed: int) -> list[MicroBatch]:
        """Collates the micro-batches of `share`, which are parts of `window`.

        Args:
            window: positions of all rows of the window, on all processes.
            share: positions of each micro-batch of this process; an empty one becomes a ghost, and so does one
                without loss items.
            seed: settles the collator's draws.

        Raises:
            DataError: naming a row that cannot be read, padded or used.
        """
        return [self._or_ghost(micro) for micro in self.stream(window, share, *seed)]

    def stream(self, window: Sequence[int], share: Sequence[Sequence[int]], *seed: int) -> Iterator[MicroBatch]:
        """The same, one micro-batch after the other, and as they are: without ghosts, for looking and not learning."""
        if self.by_window:
            whole = self._collation.seeded(self._rows, window, *seed)
            place = {position: n for n, position in enumerate(window)}
        for rows in share:
            if not rows:
                yield MicroBatch(None, dict.fromkeys(self._objective.terms, 0), (), 0, 0, 0)
            elif self.by_window:
                yield self._micro_batch(take(whole, [place[position] for position in rows]), rows)
            else:
                yield self._micro_batch(self._collation(self._rows, rows), rows)

    def _micro_batch(self, batch: Batch, rows: Sequence[int]) -> MicroBatch:
        self._ranges.check(batch, self._rows, rows)
        counts = self._objective.count(batch)
        return MicroBatch(batch, counts, _counted(counts), len(rows), *_sizes(batch))

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
        raise DataError(f"No row of `{self._rows.argument}` has loss items. Check its labels, or `count_items`.")


def _counted(counts: Counts) -> tuple[str, ...]:
    return tuple(term for term, n in counts.items() if n)


def _sizes(batch: Batch) -> tuple[int, int]:
    """Tokens without and with padding."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor):
        return 0, 0
    mask = batch.get("attention_mask")
    return int(mask.sum()) if isinstance(mask, Tensor) and mask.shape == ids.shape else ids.numel(), ids.numel()
