"""The results of accumulating a window, besides the gradient."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data.loader import MicroBatch
from ..objective.normalizer import Means, WeightedMeans
from ..runtime.state_guards import Buffers, Generators


@dataclass(frozen=True)
class WindowStart:
    """The random state and the buffers that a window started from."""

    generators: Generators
    buffers: Buffers

    def now(self) -> "WindowStart":
        """Return the current random state and the current values of the same buffers."""
        return WindowStart(Generators.now(), Buffers.now(list(self.buffers.kept)))

    def restore(self) -> None:
        """Restore the random state and the buffers."""
        self.generators.restore()
        self.buffers.restore()


@dataclass(frozen=True)
class AccumulatedWindow:
    """The losses of this process's passes over a window; tensors stay on the device.

    Attributes:
        start: the state to restore if the window's update is skipped.
        losses: the mean losses over this process's micro-batches.
        items: the window's loss items on all processes, of shape (terms,).
        contributions: each micro-batch that was run, with its part of the window's loss (a scalar).
        moved_buffers: for each large buffer that no earlier window had changed, whether this one did.
    """

    start: WindowStart
    losses: WeightedMeans
    items: Tensor
    contributions: list[tuple[MicroBatch, Tensor]] = field(default_factory=list)
    moved_buffers: Tensor = field(default_factory=lambda: torch.zeros(0))

    def add(self, micro: MicroBatch, means: Means, contribution: Tensor) -> None:
        """Record one forward and backward pass."""
        self.losses.add(means, micro.counts)
        self.contributions.append((micro, contribution.detach()))

    def read_with(self, norm: Tensor) -> tuple[float, float, list[float], list[bool]]:
        """Return the gradient's norm, the number of loss items, each micro-batch's part of the loss, and moved buffers.

        Read all of them from the device at once.
        """
        losses = torch.stack([contribution for _, contribution in self.contributions])
        parts = [norm.reshape(1), self.items.sum().reshape(1), losses, self.moved_buffers]
        grad_norm, n_items, *others = torch.cat([part.to(norm.device) for part in parts]).tolist()
        n_passes = len(losses)
        return grad_norm, n_items, others[:n_passes], [bool(flag) for flag in others[n_passes:]]
