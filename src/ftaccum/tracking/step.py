"""The outcome of one window, before it is recorded."""

from dataclasses import dataclass

from ..objective.normalizer import WeightedMeans
from .phase_timer import UpdateSeconds
from .work import Work


@dataclass(frozen=True)
class NoiseMeasurement:
    """How far the gradients of two random halves of a window agree.

    Attributes:
        agreement: their product, whose mean over windows is the squared norm of the true gradient.
        power: the squared norm of the window's gradient.
        seconds: the time that measuring took, without the time that more passes take. On a device, the time to start
            its work.
    """

    agreement: float
    power: float
    seconds: float


@dataclass(frozen=True)
class StepResult:
    """The outcome of one window. `losses` are those of this process and stay on the device.

    Attributes:
        work: tokens, token positions and passes of this process.
        rows: rows of the window, over all processes.
        losses: mean losses over this process's micro-batches.
        grad_norm: total gradient norm before clipping, synced and unscaled.
        learning_rate: the rate that the update used, or would have used if it was skipped.
        skipped: whether no optimizer step was taken.
        clip_coefficient: the factor by which clipping multiplied the gradient; NaN if the norm is not finite.
        seconds: the time of this process in each phase of the update.
        peak_memory: the most bytes of this process so far, on its device; 0 if not known.
        noise: the agreement of the halves of the window; None if it was not measured.
    """

    work: Work
    rows: int
    losses: WeightedMeans
    grad_norm: float
    learning_rate: float
    skipped: bool
    clip_coefficient: float
    seconds: UpdateSeconds
    peak_memory: int
    noise: NoiseMeasurement | None = None
