"""One order of rows for all processes, where Trainer lets each of them draw its own."""

from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from transformers.trainer_pt_utils import LengthGroupedSampler


class SharedLengthGroups(LengthGroupedSampler):
    """Rows grouped by length, in an order that follows from the seed and the epoch.

    Trainer's sampler draws from the generator of its process. Dropout moves these generators apart, so that from the
    second epoch on, processes would share out different orders: some rows would come twice, and others not at all. And
    a run that resumes within an epoch would draw another order, because Trainer restores the generator after it.
    """

    seed: int

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of an epoch. Accelerate calls this before it reads one."""
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


def share_order(loader: Any, seed: int) -> None:
    """Make the sampler of a loader draw one order on all processes, and again on resume, if it does not do so already.

    Like the samplers of `repeated_rows`, it becomes an object of another class, since loaders hold it.
    """
    batches = getattr(loader, "batch_sampler", None)
    if isinstance(batches, BatchSamplerShard):
        batches = batches.batch_sampler
    sampler: Any = getattr(batches, "sampler", None)
    if type(sampler) is LengthGroupedSampler and sampler.generator is None:
        sampler.__class__ = SharedLengthGroups
        sampler.seed = seed
