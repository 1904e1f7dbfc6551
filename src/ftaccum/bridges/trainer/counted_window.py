"""A window whose loss items are counted, on its way through a Trainer's `training_step`."""

from collections.abc import Sequence

from accelerate import Accelerator

from ...data.loader import MicroBatch
from ...objective.normalizer import LossNormalizer


class CountedWindow:
    """The counts of a window. It takes the place of the Trainer's own `num_items_in_batch`.

    Attributes:
        normalizer: scales the loss of each micro-batch.
        is_uneven: whether the micro-batches of different processes may have unequal numbers of rows.
    """

    def __init__(
        self, micro_batches: Sequence[MicroBatch], terms: Sequence[str], accelerator: Accelerator, *, is_uneven: bool
    ) -> None:
        """Sum the loss items of the window over all processes."""
        # A Trainer has Accelerate divide by 1, whatever the number of passes.
        self.normalizer = LossNormalizer([micro.counts for micro in micro_batches], terms, accelerator, n_divided_by=1)
        self.is_uneven = is_uneven
        self._coming = list(micro_batches)
        self._has_items = not all(micro.is_dummy for micro in micro_batches)

    @property
    def n_left(self) -> int:
        """The number of micro-batches that have not run yet."""
        return len(self._coming)

    @property
    def is_empty(self) -> bool:
        """Whether no process has loss items. Asks the device only if this process has none."""
        return not self._has_items and not self.normalizer.items_T.any()

    @property
    def coming(self) -> MicroBatch:
        """The micro-batch of the next pass."""
        return self._coming[0]

    def next(self) -> MicroBatch:
        """Return the micro-batch of the pass that begins now."""
        return self._coming.pop(0)
