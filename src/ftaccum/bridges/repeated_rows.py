"""The rows that Accelerate repeats at the end of an epoch so that all processes have equally many."""

from collections.abc import Iterator, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher

from ..data.batches import take
from ..objective.item_counts import Batch, rows_of


class DistinctBatches(BatchSamplerShard):
    """A process's share of the batches of an epoch, without repeated rows.

    A batch that consists of repeated rows stays whole, so that every process has the same number of batches, and
    `n_real` of its rows are 0. It takes the place of Accelerate's sampler in a loader, as another class of the same
    object, because a `DataLoader` does not let its sampler be replaced.
    """

    def __iter__(self) -> Iterator[list[int]]:
        for n, batch in enumerate(super().__iter__()):
            yield batch[: self.n_real(n) or None]

    def n_real(self, n: int) -> int:
        """Return how many rows of batch n of the epoch, on this process, are not repeated."""
        n_rows = len(self.batch_sampler.sampler)
        start = (n * self.num_processes + self.process_index) * self._n_each
        return max(0, min(self._n_each, n_rows - start))

    @property
    def _n_each(self) -> int:
        """The number of rows of a full batch on one process."""
        return self.batch_size // self.num_processes if self.split_batches else self.batch_size


class RepeatedRows:
    """Finds the repeated rows in the batches of a loader.

    Attributes:
        at_end: whether the last batch that was read is the last one of its epoch.
    """

    def __init__(self, loader: Any, accelerator: Accelerator) -> None:
        """Make a loader leave out the rows that Accelerate would repeat, as far as it can."""
        self._accelerator = accelerator
        self._dispatches = isinstance(loader, DataLoaderDispatcher)
        self._sampler = _distinct(getattr(loader, "batch_sampler", None))
        self.at_end, self._n_last = False, -1

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
            are_real = (self._sampler.n_real(n) > 0 for n in range(n_read - len(batches), n_read))
            return [batch if is_real else None for batch, is_real in zip(batches, are_real, strict=True)]
        if not self._dispatches or self._accelerator.num_processes == 1 or self._n_last <= 0:
            return list(batches)
        # The main process has filled up the last batch and cut it into equal parts.
        n_rows = rows_of(batches[-1])
        n_real = min(n_rows, max(0, self._n_last - n_rows * self._accelerator.process_index))
        last = take(batches[-1], range(n_real)) if n_real else None
        return [*batches[:-1], last]


def _distinct(sampler: Any) -> DistinctBatches | None:
    if isinstance(sampler, DistinctBatches):
        return sampler
    if type(sampler) is not BatchSamplerShard or not sampler.even_batches or not sampler.batch_size:
        return None
    sampler.__class__ = DistinctBatches
    return sampler
