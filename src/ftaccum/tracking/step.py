"""What one window yields, before it is written anywhere."""

from dataclasses import dataclass

from ..objective.normalizer import WeightedMeans
from .throughput import Throughput


@dataclass(frozen=True)
class StepResult:
    """The outcome of one window. `losses` are this process's part, and stay on the device.

    Attributes:
        work: rows, positions and passes of this process.
        rows: rows of the window, on all processes.
        losses: mean losses over this process's micro-batches.
        grad_norm: total norm before clipping, synced and unscaled.
        learning_rate: the rate that the update used, or would have used.
        skipped: whether no optimizer step was taken.
    """

    work: Throughput
    rows: int
    losses: WeightedMeans
    grad_norm: float
    learning_rate: float
    skipped: bool
