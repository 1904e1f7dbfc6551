"""Samples of collated batches, whose rows cannot be loaded again: batches are taken apart, and joined."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from accelerate.utils import send_to_device

from ..accumulation.audit_sample import Piece, choose_part
from ..data.batches import has_rows, hides_padding, join, take, token_positions
from ..data.loader import MicroBatch
from ..objective.item_counts import Batch, rows_of
from ..objective.objective import Objective
from ..planning.audit_schedule import AuditSize
from ..planning.micro_batches import MicroBatchRows
from ..runtime.process_group import ProcessGroup

_FEW = 2  # micro-batches of an audit of a few rows


@dataclass(frozen=True)
class AuditBatches:
    """Collated batches to audit: an `AuditSample`.

    Attributes:
        micro_batches: this process's micro-batches, as training runs them.
        n_rows: the number of rows, on all processes.
        most_rows: the number of rows of the largest micro-batch of any process.
        times_largest: the size of one batch of all rows, in multiples of the largest micro-batch, rounded up.
        objective: counts the loss items of new micro-batches.
        process_group: the processes that hold the micro-batches.
        fill: the padding of columns when batches are joined.
        dummy: the dummy micro-batch of this process.
        is_packed: False, because joined batches have a row for each of the rows they are made of.
    """

    micro_batches: Sequence[MicroBatch]
    n_rows: int
    most_rows: int
    times_largest: int
    objective: Objective
    process_group: ProcessGroup
    fill: Mapping[str, int]
    dummy: MicroBatch
    is_packed: bool = False

    @classmethod
    def of(
        cls,
        micro_batches: Sequence[MicroBatch],
        objective: Objective,
        process_group: ProcessGroup,
        fill: Mapping[str, int],
        size: AuditSize,
    ) -> "AuditBatches | None":
        """Return the sample of a window, or of a few of its micro-batches. All processes must call it.

        Args:
            micro_batches: this process's micro-batches of the window, as its accumulator takes them. Those without loss
                items are dummies, and their rows are not audited.
            size: the rows to take; a few rows are those of two micro-batches.

        Returns:
            None on all processes if there are no rows, or if the rows of a batch cannot be taken apart.
        """
        own = [micro for micro in micro_batches if not micro.is_dummy]
        if size is AuditSize.FEW_ROWS:
            pieces = [Piece((process_group.index, n), m.batch, _size(m.batch)) for n, m in enumerate(own)]
            chosen = choose_part(pieces, _FEW, process_group)
            own = [own[n] for index, n in chosen if index == process_group.index]
        sizes = [(rows_of(m.batch), _size(m.batch)) if has_rows(m.batch) else None for m in own]
        known = list(chain.from_iterable(process_group.gather(sizes)))
        found = [size for size in known if size is not None]
        if not found or len(found) < len(known):
            return None
        n_rows, most_rows = sum(rows for rows, _ in found), max(rows for rows, _ in found)
        widest, largest = max(size / rows for rows, size in found), max(size for _, size in found)
        times_largest = math.ceil(n_rows * widest / largest)
        dummy = _dummy(micro_batches, objective, process_group)
        kept = micro_batches or [dummy]
        sample = cls(kept, n_rows, most_rows, times_largest, objective, process_group, fill, dummy)
        return sample._with(own) if size is AuditSize.FEW_ROWS else sample

    def load(self) -> list[MicroBatch]:
        return list(self.micro_batches)

    def in_one(self) -> "AuditBatches | None":
        batches = [micro.batch for micro in self._own]
        if not self.process_group.is_single:
            batches = send_to_device(batches, torch.device("cpu"))
        everything = list(chain.from_iterable(self.process_group.gather_on_main(batches)))
        if not self.process_group.is_main:
            return None
        micro = self._joined(everything)
        return None if micro is None else replace(self, micro_batches=[micro])

    def cut_differently(self) -> "AuditBatches | None":
        """Return batches of at most half as many rows as the largest one; or, if all have a single row, pairs of them.

        Batches are cut at their width, so that rows keep the positions of their tokens.
        """
        parts = self._pairs() if self.most_rows == 1 else self._halves()
        own = [micro for micro in parts if micro is not None]
        is_impossible, has_other = self.process_group.any_of([len(own) < len(parts), len(own) != len(self._own)])
        if is_impossible or not has_other:
            return None
        return self._with([micro for micro in own if not micro.is_dummy])

    def reversed(self) -> "AuditBatches":
        turned = [
            replace(micro, batch=take(micro.batch, range(rows_of(micro.batch))[::-1])) for micro in reversed(self._own)
        ]
        own = iter(_in_order(turned))
        return replace(self, micro_batches=[m if m.is_dummy else next(own) for m in self.micro_batches])

    @property
    def _own(self) -> list[MicroBatch]:
        """The micro-batches that have loss items."""
        return [micro for micro in self.micro_batches if not micro.is_dummy]

    def _halves(self) -> list[MicroBatch | None]:
        n = self.most_rows // 2

        def halves(batch: Batch) -> Iterator[Batch]:
            for start in range(0, rows_of(batch), n):
                yield take(batch, range(start, min(start + n, rows_of(batch))))

        return [self._micro_batch(half) for micro in self._own for half in halves(micro.batch)]

    def _pairs(self) -> list[MicroBatch | None]:
        batches = [micro.batch for micro in self._own]
        return [self._joined(batches[n : n + 2]) for n in range(0, len(batches), 2)]

    def _joined(self, batches: Sequence[Batch]) -> MicroBatch | None:
        batch = join(batches, self.fill)
        return self._micro_batch(batch) if batch is not None and hides_padding(batches) else None

    def _micro_batch(self, batch: Batch) -> MicroBatch | None:
        """Return a micro-batch with its loss items; None if they cannot be counted."""
        try:
            return MicroBatch.of(batch, self.objective.count(batch))
        except Exception:  # `count_items` may only know batches as the loop makes them
            return None

    def _with(self, own: Sequence[MicroBatch]) -> "AuditBatches":
        """Return the sample with other micro-batches of this process, and as many dummies as all processes need.

        Of several processes, each needs gradients of all terms in its last pass, in which they sync them.
        """
        micro_batches = _in_order(own)
        lacks_terms = not own or len(micro_batches[-1].terms) < len(self.dummy.terms)
        if lacks_terms and not self.process_group.is_single:
            micro_batches.append(self.dummy)
        n_passes = max(self.process_group.gather(len(micro_batches)))
        return replace(self, micro_batches=[*[self.dummy] * (n_passes - len(micro_batches)), *micro_batches])


def _dummy(micro_batches: Sequence[MicroBatch], objective: Objective, process_group: ProcessGroup) -> MicroBatch:
    """Return a dummy with as many terms as possible; that of another process if this one has no micro-batches."""
    real = max(micro_batches, key=lambda micro: len(micro.terms), default=None)
    counts = dict.fromkeys(objective.terms, 0)
    own = None if real is None else replace(real, counts=counts, slice=MicroBatchRows())
    if process_group.any(own is None):
        sent = None if own is None else replace(own, batch=send_to_device(own.batch, torch.device("cpu")))
        others = [dummy for dummy in process_group.gather(sent) if dummy is not None]
        own = own or others[0]
    assert own is not None, "some process has rows"
    return own


def _in_order(micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Return micro-batches with the fewest terms first."""
    return sorted(micro_batches, key=lambda micro: len(micro.terms))


def _size(batch: Batch) -> int:
    """Return the number of token positions, or of rows if there are no tokens; 0 if it has no rows either."""
    if not has_rows(batch):
        return 0
    return token_positions(batch) or rows_of(batch)
