"""The rows that are repeated at the end of an epoch so that all processes have equally many."""

from collections.abc import Iterator, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher
from transformers import trainer_pt_utils

from ..data.batches import take
from ..objective.item_counts import Batch, rows_of
from .planned_batches import PlannedBatches

# Older versions of Transformers, with which `exact` is refused, do not have it.
_Rebalance: Any = getattr(trainer_pt_utils, "BatchRebalanceSampler", object)


class DistinctBatches(BatchSamplerShard):
    """A process's share of the batches of an epoch, without repeated rows.

    A batch that consists of repeated rows stays whole, so that every process has the same number of batches. This class
    takes the place of that of Accelerate's sampler in a loader, because a `DataLoader` does not let its sampler be
    replaced.
    """

    def __iter__(self) -> Iterator[list[int]]:
        for n, batch in enumerate(super().__iter__()):
            yield batch[: self._n_real(n) or None]

    def is_repeated(self, n: int) -> bool:
        """Return whether batch n of the epoch, on this process, consists of repeated rows."""
        return not self._n_real(n)

    def _n_real(self, n: int) -> int:
        """Return how many rows of batch n are not repeated."""
        n_rows = len(self.batch_sampler.sampler)
        start = (n * self.num_processes + self.process_index) * self._n_each
        return max(0, min(self._n_each, n_rows - start))

    @property
    def _n_each(self) -> int:
        """The number of rows of a full batch on one process."""
        return self.batch_size // self.num_processes if self.split_batches else self.batch_size


class DistinctGroups(_Rebalance):
    """A process's share of balanced batches, of which those without rows of their own are known.

    If an epoch leaves fewer rows than an update has micro-batches on all processes, Trainer fills up with rows from the
    beginning. This class gives each row that is left a micro-batch, and the others one of these rows again. Like
    `DistinctBatches`, it takes the place of the class of a sampler.
    """

    @property
    def has_tail(self) -> bool:
        """False, so that the rows that are left come without others. `num_global_batches` includes them."""
        return False

    def is_repeated(self, n: int) -> bool:
        """Return whether batch n of the epoch, on this process, consists of repeated rows."""
        place, group = divmod(n, self.grad_accum)
        return place == self.num_full_batches and self.remainder <= group * self.dp_size + self.rank

    def _yield_global_batch(self, rows: list[int]) -> Iterator[list[int]]:
        if len(rows) >= self.grad_accum * self.dp_size:
            yield from super()._yield_global_batch(rows)
            return
        for group in range(self.grad_accum):
            place = group * self.dp_size + self.rank
            yield [rows[place] if place < len(rows) else rows[0]]


class RepeatedRows:
    """Finds the repeated rows in the batches of a loader.

    Attributes:
        at_end: whether the last batch that was read is the last one of its epoch.
    """

    def __init__(self, loader: Any, accelerator: Accelerator, planned: PlannedBatches | None = None) -> None:
        """Make a loader leave out the rows that Accelerate would repeat, as far as it can.

        Args:
            planned: the sampler of the loader, if it plans windows.
        """
        self._accelerator = accelerator
        self._dispatches = isinstance(loader, DataLoaderDispatcher)
        self._sampler = planned or _distinct(getattr(loader, "batch_sampler", None))
        self.at_end, self._n_last = False, -1

    @property
    def is_uneven(self) -> bool:
        """Whether processes may have unequal numbers of rows in the batches that were read last."""
        return self._accelerator.num_processes > 1 and (
            self.at_end or isinstance(self._sampler, DistinctGroups | PlannedBatches)
        )

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches of an epoch. A loader tells only while it is being read whether a batch is its last."""
        state = self._accelerator.gradient_state
        for batch in batches:
            self.at_end, self._n_last = state.end_of_dataloader, state.remainder
            yield batch

    def leave_out(self, batches: Sequence[Batch]) -> list[Batch | None]:
        """Return the last batches that were read without repeated rows: None for one that has no others."""
        if not self.at_end:
            return list(batches)
        if self._sampler is not None:
            n_read = len(self._sampler)
            repeated = map(self._sampler.is_repeated, range(n_read - len(batches), n_read))
            return [None if is_repeated else batch for batch, is_repeated in zip(batches, repeated, strict=True)]
        if not self._dispatches or self._accelerator.num_processes == 1 or self._n_last <= 0:
            return list(batches)
        # The main process has filled up the last batch and cut it into equal parts.
        n_rows = rows_of(batches[-1])
        n_real = min(n_rows, max(0, self._n_last - n_rows * self._accelerator.process_index))
        last = take(batches[-1], range(n_real)) if n_real else None
        return [*batches[:-1], last]


def _distinct(sampler: Any) -> DistinctBatches | DistinctGroups | None:
    """Make a sampler leave out repeated rows, and return it; None if it repeats none, or cannot leave them out."""
    if type(sampler) is BatchSamplerShard and type(sampler.batch_sampler) in (_Rebalance, DistinctGroups):
        sampler = sampler.batch_sampler  # Trainer keeps Accelerate from sharding it
    if isinstance(sampler, DistinctBatches | DistinctGroups):
        return sampler
    if type(sampler) is _Rebalance:
        sampler.__class__ = DistinctGroups
        return sampler
    if type(sampler) is BatchSamplerShard and sampler.even_batches and sampler.batch_size:
        sampler.__class__ = DistinctBatches
        return sampler
    return None
