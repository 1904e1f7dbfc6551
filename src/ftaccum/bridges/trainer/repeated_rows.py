"""The rows that are repeated at the end of an epoch so that all processes have equally many."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard, IterableDatasetShard
from torch.utils.data import IterableDataset
from transformers import trainer_pt_utils

from ...errors import SettingsError
from ...objective.item_counts import Batch
from ...runtime.log import logger
from ..loader_repeats import parts_of, repeats_rows, without_fill
from .planned_batches import PlannedBatches

# Older versions of Transformers, with which `exact` is refused, do not have it.
_Rebalance: Any = getattr(trainer_pt_utils, "BatchRebalanceSampler", object)


class DistinctBatches(BatchSamplerShard):
    """A process's share of the batches of an epoch, without repeated rows.

    Every process has the same number of batches, so one without rows at the end gets one row again. This class takes
    the place of that of Accelerate's sampler in a loader, because a `DataLoader` does not let its sampler be replaced.

    Attributes:
        n_repeated: how many batches at the end of an epoch consist of a repeated row, once the epoch is read.
    """

    n_repeated = 0

    def __iter__(self) -> Iterator[list[int]]:
        for own, others in self._shares():
            self.n_repeated = 0 if own else 1
            yield own or others[:1]

    def _shares(self) -> Iterator[tuple[list[int], list[int]]]:
        """Yield the rows of each batch on this process, and on the first one."""
        batches = iter(self.batch_sampler)
        if self.split_batches:
            size = self.batch_size // self.num_processes
            for batch in batches:
                yield batch[size * self.process_index :][:size], batch
            return
        while round_ := list(itertools.islice(batches, self.num_processes)):
            if len(round_) == self.num_processes or not self.drop_last:
                yield next(iter(round_[self.process_index :]), []), round_[0]


class DistinctGroups(_Rebalance):
    """A process's share of balanced batches. It knows which batches have only repeated rows.

    If an epoch leaves fewer rows than an update has micro-batches on all processes, Trainer fills up with rows from the
    beginning. This class gives each row that is left a micro-batch, and the others one of these rows again. Like
    `DistinctBatches`, it takes the place of the class of a sampler.
    """

    @property
    def has_tail(self) -> bool:
        """False, so that the rows that are left come without others. `num_global_batches` includes them."""
        return False

    @property
    def n_repeated(self) -> int:
        """The number of batches at the end of an epoch, on this process, that consist of repeated rows."""
        if self.num_global_batches == self.num_full_batches:
            return 0
        n_real = len(range(self.rank, self.remainder, self.dp_size))
        return max(0, self.grad_accum - n_real)

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
        """Make a loader leave out the rows that Accelerate would repeat, and log on the main process if it cannot.

        Args:
            planned: the sampler of the loader, if it plans windows.

        Raises:
            SettingsError: if each of several processes reads its own rows of a stream.
        """
        _refuse_shared_streams(loader, accelerator.num_processes)
        self._accelerator = accelerator
        self._dispatches = isinstance(loader, DataLoaderDispatcher)
        self._sampler = planned or _distinct(getattr(loader, "batch_sampler", None))
        self.at_end, self._n_last = False, -1
        for part in parts_of(loader):
            if repeats_rows(part) and part is not self._sampler and accelerator.process_index == 0:
                logger.warning(
                    "Rows that %s repeats at the end of an epoch count again: `exact` cannot leave them out. "
                    "Give `accelerator.prepare` a DataLoader with a sampler that repeats no rows.",
                    type(part).__name__,
                )

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
            n_real = max(0, len(batches) - self._sampler.n_repeated)
            return [*batches[:n_real], *[None] * (len(batches) - n_real)]
        if not self._dispatches or self._accelerator.num_processes == 1 or self._n_last <= 0:
            return list(batches)
        return [*batches[:-1], without_fill(batches[-1], self._n_last, self._accelerator.process_index)]


def _refuse_shared_streams(loader: Any, num_processes: int) -> None:
    """Refuse a stream that each process reads itself, unless all get the same number of rows, and none twice."""
    dataset = getattr(loader, "dataset", None)
    if num_processes == 1 or not (isinstance(loader, DataLoaderShard) and isinstance(dataset, IterableDataset)):
        return
    if isinstance(dataset, IterableDatasetShard) and not repeats_rows(dataset):
        return
    raise SettingsError(
        [
            "`accelerator_config.dispatch_batches` is False and `train_dataset` is a stream, but where a stream ends, "
            f"{num_processes} processes that read their own rows would repeat some or wait for each other forever. "
            "Leave `dispatch_batches` out: the main process then reads the rows and deals them."
        ]
    )


def _distinct(sampler: Any) -> DistinctBatches | DistinctGroups | None:
    """Make a sampler leave out repeated rows, and return it; None if it repeats none, or cannot leave them out."""
    if type(sampler) is BatchSamplerShard and type(sampler.batch_sampler) in (_Rebalance, DistinctGroups):
        sampler = sampler.batch_sampler  # Trainer keeps Accelerate from sharding it
    if isinstance(sampler, DistinctBatches | DistinctGroups):
        return sampler
    if type(sampler) is _Rebalance:
        sampler.__class__ = DistinctGroups
        return sampler
    if type(sampler) is BatchSamplerShard and sampler.even_batches and sampler.num_processes > 1:
        sampler.__class__ = DistinctBatches
        return sampler
    return None
