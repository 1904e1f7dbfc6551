"""Where loaders of several processes repeat rows at the end of an epoch, so that all processes get equally many."""

from typing import Any

from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from torch.utils.data import BatchSampler, DistributedSampler

from ..data.batches import take
from ..objective.item_counts import Batch, rows_of


def parts_of(loader: Any) -> list[Any]:
    """Return the samplers of a loader, those inside them, and its data set."""
    found: list[Any] = []
    waiting = [getattr(loader, name, None) for name in ("batch_sampler", "sampler", "dataset")]
    while waiting:
        part = waiting.pop()
        if part is not None and not any(part is known for known in found):
            found.append(part)
            inside = ("batch_sampler", "sampler") if isinstance(part, BatchSampler) else ()
            waiting += [getattr(part, name, None) for name in inside]
    return found


def repeats_rows(part: Any) -> bool:
    """Return whether a sampler or a data set may repeat rows at the end of an epoch."""
    if isinstance(part, DistributedSampler):
        rows = getattr(part, "dataset", ())  # some subclasses keep only lengths
        return len(rows) < part.total_size
    if isinstance(part, BatchSamplerShard):
        return part.num_processes > 1 and part.even_batches and not part.drop_last
    return isinstance(part, IterableDatasetShard) and part.num_processes > 1 and not part.drop_last


def without_fill(batch: Batch, n_dealt: int, process_index: int) -> Batch | None:
    """Return the rows of the last dealt batch that are not repeated; None if this process has no others.

    Accelerate's `DataLoaderDispatcher` completes the last batch on the main process with rows of the first one, and
    cuts it into equal parts.

    Args:
        batch: this process's part.
        n_dealt: the number of rows before it was completed, which is the loader's `remainder` at its end.
        process_index: index of this process, from 0.
    """
    n_rows = rows_of(batch)
    n_real = min(n_rows, n_dealt - n_rows * process_index)
    return take(batch, range(n_real)) if n_real > 0 else None
