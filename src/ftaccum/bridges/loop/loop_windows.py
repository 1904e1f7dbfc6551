"""The windows of a loader in a loop that the user wrote: lists of micro-batches, without repeated rows.

So that all processes get equally many rows, Accelerate's loaders and torch's DistributedSampler repeat the first rows
of an epoch at its end. Each repeated row would count twice in a window's mean.
"""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, IterableDatasetShard
from torch.utils.data import BatchSampler, DistributedSampler

from ...objective.item_counts import Batch
from ...runtime.process_group import ProcessGroup
from ...runtime.temporary_attribute import temporary_attribute
from ..loader_repeats import parts_of, repeats_rows, without_fill


def windows_of(loader: Iterable[Batch], k: int, process_group: ProcessGroup) -> Iterator[list[Batch]]:
    """Yield the batches of one pass over a loader in lists of k; the last list may be shorter.

    All processes get the same number of lists. A list may be shorter, or empty, where other processes have more rows.
    """
    inside = _loader_inside(loader)
    with _without_repeats(inside, process_group):
        batches = _batches_of(loader, inside, process_group)
        while process_group.any(bool(window := list(itertools.islice(batches, k)))):
            yield window


def _loader_inside(loader: Any) -> Any:
    """Return the loader inside a progress bar of tqdm."""
    return getattr(loader, "iterable", loader)


@contextmanager
def _without_repeats(loader: Any, process_group: ProcessGroup) -> Iterator[None]:
    """Stop samplers and data sets from repeating rows until exit."""
    with ExitStack() as stack:
        if not process_group.is_single:
            for part in filter(repeats_rows, parts_of(loader)):
                if isinstance(part, BatchSamplerShard):
                    stack.enter_context(temporary_attribute(part, "even_batches", False))
                elif isinstance(part, IterableDatasetShard):
                    stack.enter_context(temporary_attribute(part, "__class__", _UnevenShard))
                elif type(part).__iter__ is DistributedSampler.__iter__:
                    stack.enter_context(_without_padding(loader, part))
            stack.enter_context(_counted_epoch(loader))
        yield


@contextmanager
def _counted_epoch(loader: Any) -> Iterator[None]:
    """Count an epoch in which this process had no rows. Accelerate does not, and shuffles by that number."""
    before = getattr(loader, "iteration", None)
    yield
    if isinstance(before, int) and loader.iteration == before:
        loader.iteration = before + 1


def _without_padding(loader: Any, sampler: DistributedSampler[Any]) -> AbstractContextManager[object]:
    """Return a context manager in which a loader does not read the rows that a DistributedSampler repeats."""
    n_rows = len(sampler.dataset)  # type: ignore[arg-type]
    first = _First(sampler, len(range(sampler.rank, n_rows, sampler.num_replicas)))
    owner = getattr(loader, "batch_sampler", None)
    return temporary_attribute(owner, "sampler", first) if isinstance(owner, BatchSampler) else nullcontext()


class _First:
    """The first rows of a sampler. Other names are the sampler's own."""

    def __init__(self, sampler: Any, n_rows: int) -> None:
        self._sampler, self._n_rows = sampler, n_rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def __len__(self) -> int:
        return self._n_rows

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._sampler), self._n_rows)


class _UnevenShard(IterableDatasetShard):
    """A process's rows of a stream, without rows that are repeated at its end."""

    def __iter__(self) -> Iterator[Any]:
        generator = getattr(self.dataset, "generator", None)
        if generator is not None and not hasattr(self.dataset, "set_epoch"):
            generator.manual_seed(self.epoch)  # as the class above does
        own = self.batch_size // self.num_processes if self.split_batches else self.batch_size
        rows, size = iter(self.dataset), own * self.num_processes
        while block := list(itertools.islice(rows, size)):
            if len(block) == size or not self.drop_last:
                yield from block[own * self.process_index :][:own]


def _batches_of(loader: Iterable[Batch], inside: Any, process_group: ProcessGroup) -> Iterator[Batch]:
    """Yield the batches of a loader, without rows that the main process repeats if it reads and deals them."""
    is_dealt = not process_group.is_single and isinstance(inside, DataLoaderDispatcher)
    for batch in loader:
        if not (is_dealt and inside.end_of_dataloader):
            yield batch
        elif (real := without_fill(batch, inside.remainder, inside.state.process_index)) is not None:
            yield real
