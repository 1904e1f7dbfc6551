"""Cut the windows of a Trainer's loader again, into micro-batches of rows of similar length.

Each window keeps its rows and its number of micro-batches on each process. Only which rows share a micro-batch changes.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher
from datasets import Dataset
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler

from ...data.convert import as_rows
from ...errors import DataError
from ...planning.micro_batches import BatchLimits, MicroBatchPlanner, MicroBatchRows, RowIndices
from ...runtime.log import logger
from ...runtime.state_guards import preserve_rng

_MOST_ROWS = 512  # to cut at once, because the time grows with the rows and with the passes
# Fractions of the token limit to try. A lower limit costs few tokens, and lets loads be dealt evenly if a few rows are
# much longer than the others.
_FRACTIONS = (1, 2, 3)


class PlannedBatches(Sampler[list[int]]):
    """The micro-batches of one process, with the rows of each window sorted by length.

    A window has the rows that it would have without the planner: k rounds of one batch on each process, in the order of
    `sampler`. The last window of an epoch is shorter. Rows that Accelerate would repeat there are left out. No
    micro-batch has more tokens, padding included, than `batch_size` times the longest row of its window. All processes
    have the same number of micro-batches, which is that of the loader without the planner.

    If the last window has fewer rows than micro-batches, the last batch of some processes is a placeholder: a row of
    the same window that another process has. `n_repeated` is their number on this process.

    It has no attribute `batch_size`, so that Accelerate does not truncate what it gathers at the end of an epoch: it
    could not know which rows to drop.
    """

    def __init__(
        self,
        sampler: Any,
        lengths: Sequence[int],
        *,
        batch_size: int,
        k: int,
        num_processes: int = 1,
        process_index: int = 0,
        drop_last: bool = False,
    ) -> None:
        """Args:
        sampler: the positions of an epoch's rows, in the same order on all processes; has a length.
        lengths: the length of each row of the data set in tokens.
        batch_size: rows of a micro-batch on one process without the planner.
        k: number of micro-batches of a window on one process.
        num_processes: number of processes.
        process_index: index of this process, from 0.
        drop_last: whether rows that do not fill a batch on every process are left out.
        """
        self.sampler = sampler
        self._lengths = np.maximum(1, np.asarray(lengths, dtype=np.int64))
        self._batch_size, self._k = batch_size, k
        self._num_processes, self._process_index = num_processes, process_index
        self._drop_last = drop_last

    def __len__(self) -> int:
        return self._n_rounds(self._n_rows)

    def __iter__(self) -> Iterator[list[int]]:
        order = map(int, self.sampler)  # read to its end, because some samplers only then count the epoch
        while window := tuple(itertools.islice(order, self._k * self._round)):
            kept = len(window) // self._round * self._round if self._drop_last else len(window)
            for start, end in itertools.pairwise([0, *self._part_ends(kept)]):
                yield from self._cut(window[start:end])

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the sampler, if it has epochs."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    @property
    def n_repeated(self) -> int:
        """The number of batches at the end of an epoch that only keep this process in step with the others: 0 or 1.

        It follows from the number of rows alone, so that batches may be read ahead or skipped.
        """
        starts_and_ends = [0, *self._part_ends((self._n_rows - 1) % (self._k * self._round) + 1)]
        rows = starts_and_ends[-1] - starts_and_ends[-2]
        n_placeholders = self._n_rounds(rows) * self._num_processes - rows
        return int(self._process_index >= self._num_processes - n_placeholders)

    @property
    def _round(self) -> int:
        """Rows of one micro-batch on each process, without the planner."""
        return self._batch_size * self._num_processes

    @property
    def _n_rows(self) -> int:
        n_rows = len(self.sampler)
        return n_rows // self._round * self._round if self._drop_last else n_rows

    def _n_rounds(self, n_rows: int) -> int:
        return math.ceil(n_rows / self._round)

    def _part_ends(self, n_rows: int) -> list[int]:
        """Return the ends of a window's parts. Each part is cut separately, and consists of whole rounds."""
        n_rounds = self._n_rounds(n_rows)
        n_parts = min(n_rounds, math.ceil(n_rows / _MOST_ROWS))
        return [min(n_rows, n_rounds * part // n_parts * self._round) for part in range(1, n_parts + 1)]

    def _cut(self, rows: RowIndices) -> Iterable[list[int]]:
        """Return this process's micro-batches of these rows."""
        lengths = self._lengths[list(rows)]
        shares = self._evenest(rows, lengths)
        shares.sort(key=lambda share: sum(not piece.rows for piece in share))  # dummies to the last processes
        placeholder = rows[int(lengths.argmin())]
        return [list(piece.rows) or [placeholder] for piece in shares[self._process_index]]

    def _evenest(self, rows: RowIndices, lengths: np.ndarray) -> list[list[MicroBatchRows]]:
        """Return the cheapest cut whose largest load of a process is the smallest."""
        found = []
        for fraction in _FRACTIONS if self._num_processes > 1 else _FRACTIONS[:1]:
            limits = BatchLimits(None, self._batch_size * int(lengths.max()) // fraction)
            planner = MicroBatchPlanner(limits, num_processes=self._num_processes, n_passes=self._n_rounds(len(rows)))
            with suppress(ValueError):  # the rows do not fit into a fraction of the limit
                found.append(planner.split(rows, lengths.tolist()))
        return min(found, key=lambda shares: max(sum(piece.tokens for piece in share) for share in shares))


def plan_batches(loader: DataLoader, lengths: Sequence[int] | None, k: int) -> PlannedBatches | None:
    """Have a loader read planned batches, and return their sampler.

    If the loader or the lengths do not allow it, log the reason on the main process, leave the loader as it is, and
    return None.

    Args:
        loader: loader of this process, as `Accelerator.prepare` returns it.
        lengths: lengths of the rows of its data set in tokens; None if they are unknown.
        k: gradient accumulation steps.
    """
    shard: Any = loader.batch_sampler
    sharded = isinstance(shard, BatchSamplerShard)
    num_processes, process_index = (shard.num_processes, shard.process_index) if sharded else (1, 0)
    batches = shard.batch_sampler if sharded else shard
    reasons = {
        "it is unknown how long the rows are in a batch. Give tokenized rows with `input_ids`, and a `data_collator` "
        "that pads to the longest row": lengths is None,
        "`dispatch_batches=True` cuts equal parts of the main process's batches": isinstance(
            loader, DataLoaderDispatcher
        ),
        f"the loader has a batch sampler of its own, {type(batches).__name__}": type(batches) is not BatchSampler,
        "`even_batches=False` gives processes different numbers of batches": sharded and not shard.even_batches,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if lengths is None or reason is not None:
        if process_index == 0:
            logger.warning("`planner=True` has no effect: %s.", reason)
        return None
    planned = PlannedBatches(
        batches.sampler,
        lengths,
        batch_size=batches.batch_size // num_processes if sharded and shard.split_batches else batches.batch_size,
        k=k,
        num_processes=num_processes,
        process_index=process_index,
        drop_last=batches.drop_last,
    )
    # A DataLoader does not let its batch sampler be assigned, because `batch_size` and `drop_last` would no longer
    # describe it. A new loader would need all options of this one, and Accelerate would not know it.
    object.__setattr__(getattr(loader, "base_dataloader", loader), "batch_sampler", planned)
    return planned


def row_lengths(dataset: Any, column: str = "length") -> Sequence[int] | None:
    """Return the lengths of a data set's rows in tokens; None if rows would have to be computed for it.

    Args:
        dataset: the data set of a Trainer.
        column: the column of a `datasets.Dataset` that holds the lengths, if there is one.
    """
    if isinstance(dataset, Dataset) and column in dataset.column_names:
        return dataset.with_format("numpy", columns=[column])[:][column]
    try:
        rows = as_rows(dataset, "train_dataset")
        return rows.lengths() if rows.have_tokens else None
    except DataError:
        return None


def pads_to_longest(loader: Any, lengths: Sequence[int]) -> bool:
    """Return whether the width of a batch follows from its longest row, as the lengths give it.

    If all batches had one width, micro-batches of many short rows would need more memory.
    """
    shortest, longest = int(np.argmin(lengths)), int(np.argmax(lengths))
    with preserve_rng():
        widths = [_width(loader.collate_fn([loader.dataset[n]])) for n in (shortest, longest)]
    if widths[0] is None or widths[1] is None:
        return False
    return lengths[shortest] == lengths[longest] or widths[0] < widths[1]


def _width(batch: Any) -> int | None:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return ids.shape[1] if isinstance(ids, Tensor) and ids.ndim == 2 else None
