"""The results of accumulating a window, besides the gradient."""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..data.loader import MicroBatch
from ..objective.normalizer import LossNormalizer, WeightedMeans
from ..runtime.state_guards import Buffers, Generators
from ..tracking.step import NoiseMeasurement
from .halves import Agreement
from .two_passes import MicroBatchLoss, TwoPasses


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
class WindowNumbers:
    """The numbers about a window that the host reads from the device.

    Attributes:
        grad_norm: the norm of the gradient.
        n_items: the number of loss items, on all processes.
        losses: the part of the window's loss of each micro-batch that was run.
        drift: the largest relative difference between the outputs of the first and the second pass; 0 with one pass.
        moved_buffers: for each large buffer that no earlier window had changed, whether this one did.
        noise: how far the gradients of the halves of the window agree; None if it was not measured.
    """

    grad_norm: float
    n_items: float
    losses: list[float]
    drift: float
    moved_buffers: list[bool]
    noise: NoiseMeasurement | None = None


@dataclass(frozen=True)
class AccumulatedWindow:
    """The losses of this process's passes over a window; tensors stay on the device.

    Attributes:
        start: the state to restore if the window's update is skipped.
        losses: the mean losses over this process's micro-batches.
        normalizer: holds the window's loss items on all processes.
        two_passes: runs the second passes while a window is accumulated whose loss reads all of its rows together;
            None for another loss, and after the last pass.
        drift: the largest relative difference between the outputs of two passes (a scalar).
        most_drift: the largest one that counts as rounding.
        forward_passes: the number of forward passes of each micro-batch.
        contributions: each micro-batch that was run, with its part of the window's loss (a scalar).
        moved_buffers: for each large buffer that no earlier window had changed, whether this one did.
        agreement: how far the gradients of the halves of the window agree; None if it was not measured.
    """

    start: WindowStart
    losses: WeightedMeans
    normalizer: LossNormalizer
    two_passes: TwoPasses | None = None
    contributions: list[tuple[MicroBatch, Tensor]] = field(default_factory=list)
    moved_buffers: Tensor = field(default_factory=lambda: torch.zeros(0))
    drift: Tensor = field(default_factory=lambda: torch.zeros(()))
    most_drift: float = 0.0
    forward_passes: int = 1
    agreement: Agreement | None = None

    def after(self, two_passes: TwoPasses) -> "AccumulatedWindow":
        """Return the window after its second passes, without what they kept in memory."""
        return replace(
            self,
            two_passes=None,
            drift=two_passes.drift,
            most_drift=two_passes.most_drift,
            forward_passes=two_passes.forward_passes,
        )

    def add(self, micro: MicroBatch, loss: MicroBatchLoss) -> None:
        """Record one forward and backward pass."""
        self.losses.add(loss.means, micro.counts)
        self.contributions.append((micro, loss.contribution.detach()))

    def read_with(self, norm: Tensor) -> WindowNumbers:
        """Return the gradient's norm and the other numbers about the window, read from the device at once."""
        losses = torch.stack([contribution for _, contribution in self.contributions])
        items = self.normalizer.items_T.sum()
        measured = [] if self.agreement is None else [self.agreement.share]
        scalars = [part.reshape(1) for part in (norm, items, self.drift, *measured)]
        parts = [part.to(norm.device) for part in (*scalars, losses, self.moved_buffers)]
        grad_norm, n_items, drift, *others = torch.cat(parts).tolist()
        noise, others = self._noise(grad_norm, *others[: len(measured)]), others[len(measured) :]
        n_passes = len(losses)
        return WindowNumbers(
            grad_norm=grad_norm,
            n_items=n_items,
            losses=others[:n_passes],
            drift=drift,
            moved_buffers=[bool(flag) for flag in others[n_passes:]],
            noise=noise,
        )

    def _noise(self, grad_norm: float, share: float = math.nan) -> NoiseMeasurement | None:
        """Return the measurement of a window's halves, given the share of its agreement."""
        if self.agreement is None:
            return None
        power = grad_norm * grad_norm
        return NoiseMeasurement(share * power, power, self.agreement.seconds)
