"""The effects of train mode on a loss and its gradient, for rows in one batch and in separate batches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..runtime.state_guards import preserve_buffers
from .deterministic_forward import DeterministicMode
from .gradient_check import GradientCheck, GradientDifference, JointGradient, if_memory_allows
from .item_counts import Batch, CountItems
from .perturbation import perturb_norms
from .probe import difference, relative
from .report import InTraining
from .sample import PAIRS, SINGLE, UNEQUAL, Sample

_UNCHANGED = 1e-6  # between two equal passes


@dataclass(frozen=True)
class TrainMode:
    """A model in train mode, without random draws.

    Attributes:
        mode: how to run the model in this way.
        sample: the rows to measure on.
        means: maps a batch to the means of its loss by term.
        losses: returns the same as numbers, with 0 for a term that the loss leaves out.
    """

    model: nn.Module
    mode: DeterministicMode
    sample: Sample
    means: Callable[[Batch], Mapping[str, Tensor]]
    losses: Callable[[Batch], Mapping[str, float]]

    def in_training(
        self, chosen: Mapping[str, CountItems], in_eval: Mapping[str, float], known: Mapping[str, float] | None = None
    ) -> InTraining:
        """Compare the losses of separate batches with that of one batch.

        Args:
            chosen: how to count each term.
            known: the loss of one batch in train mode, if it was measured already and no buffers move.
            in_eval: the loss of one batch in eval mode. If the loss in train mode is equal, and no buffers move, train
                mode does not mix rows, and nothing else is measured.
        """
        together, moving = self.sample.together, self.mode.moving

        def from_the_start(batch: Batch) -> Mapping[str, float]:
            with preserve_buffers(self.model, *self.mode.modules):
                return self.losses(batch)

        with self.mode.passes(), perturb_norms(moving.values()):
            joint = from_the_start(together) if known is None or moving else known
            if not moving and all(relative(joint[term], in_eval[term]) <= _UNCHANGED for term in chosen):
                return InTraining(dict.fromkeys(chosen, 0.0))
            separate = self.sample.separate(together, PAIRS)
            means = [from_the_start(part) for part in separate]
            complaint = complaint_of_one_row(self.losses, self.sample) if moving else None
            once = self.losses(together)
            again = self.losses(together) if moving else once
        return InTraining(
            {term: difference(joint, means, separate, term, count) for term, count in chosen.items()},
            max(relative(again[term], once[term]) for term in chosen),
            self.mode.names_of_moving,
            complaint,
        )

    def gradient_together(self, counts: Mapping[str, CountItems]) -> JointGradient | None:
        """Return the gradient of one batch and its losses; None if memory does not allow it.

        Raises:
            SettingsError: if there is no gradient.
        """

        def run() -> JointGradient:
            with self.mode.passes():
                joint = self._check(counts).with_losses(self.sample.together)
            return replace(joint, losses=dict.fromkeys(counts, 0.0) | joint.losses)

        return if_memory_allows(run)

    def gradient(
        self, joint: JointGradient | None, counts: Mapping[str, CountItems], tolerance: float
    ) -> GradientDifference:
        """Compare the gradient accumulated over separate batches with that of one batch, if memory allows.

        Args:
            joint: the gradient of one batch, if memory allowed it.
            counts: how to count each term.
            tolerance: the largest relative difference that counts as rounding.
        """
        if joint is None:
            return GradientDifference()
        together, groups = self.sample.together, PAIRS if self.mode.moving else UNEQUAL

        def run() -> GradientDifference:
            with self.mode.passes():
                separate = self.sample.separate(together, groups)
                check = self._check(counts)
                return check.difference(joint.sketch, together, separate, self.sample.reordered, tolerance)

        return if_memory_allows(run) or GradientDifference()

    def _check(self, counts: Mapping[str, CountItems]) -> GradientCheck:
        return GradientCheck(self.model, self.means, counts, self.mode.modules)


def complaint_of_one_row(run: Callable[[Batch], object], sample: Sample) -> str | None:
    """Return the error that a pass of a single row raises, as with batch norm for a single value; None if it succeeds.

    Args:
        run: runs a pass of a batch.
    """
    try:
        run(sample.separate(sample.together, SINGLE)[0])
    except ValueError as error:
        return str(error)
    return None
