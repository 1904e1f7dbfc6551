"""A short confirmation of a cached verdict: the losses of one batch and of separate ones, on the rows of this run.

Gradients are compared as well, unless the run audits its first update, which compares them on rows of training.

The one batch runs as the model does. The separate ones run as in training, with logits at labelled positions only if
an earlier run found that to be enough.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from ..runtime.memory import give_back_memory, is_out_of_memory
from ..runtime.module_attributes import preserve_attributes
from ..runtime.state_guards import Generators, preserve_buffers
from .deterministic_forward import DeterministicMode
from .gradient_check import GradientCheck
from .item_counts import Batch, tensors_of
from .labelled_head import LabelledHead, NeededLogits
from .measured_counts import chosen_counts
from .measurement import Measurement
from .own_loss import LOSS
from .perturbation import float32_weights, perturb_head
from .probe import EXPLAINED, Explanation, difference
from .rare_labels import with_rare_labels
from .recount import Observed
from .report import ExactnessReport, InTraining
from .sample import UNEQUAL, RowGroup, Sample
from .self_check_cache import Verdict


def length_of_longest(measurement: Measurement) -> int:
    """Return the positions of the longest row."""
    return max((t.numel() for t in tensors_of(measurement.sample.longest)), default=0)


def confirmed(
    measurement: Measurement,
    verdict: Verdict,
    labelled_head: LabelledHead | None = None,
    *,
    with_gradient: bool = True,
) -> ExactnessReport | None:
    """Return the report that a verdict stands for, if the rows agree with it; else None.

    The rows run in train mode without random draws, once in one batch and once in separate ones, at their own widths.
    A longest row that is longer than the one that was run runs as well. So do rows with rare values, in eval mode: the
    key does not show that a loss weights or ignores some of them.

    Args:
        labelled_head: computes the logits of the separate batches, if the verdict says that it may; else None.
        with_gradient: whether to compare the gradient, too.
    """
    measurement = replace(measurement, terms=(LOSS,))
    if verdict.way not in measurement.ways()[LOSS]:
        return None
    try:
        if length_of_longest(measurement) > verdict.longest:
            measurement.run_longest()
        with float32_weights(measurement.model, *measurement.forward.modules) as widened:
            measurement = replace(measurement, prepared=widened)
            separate = _SeparateBatches(measurement, labelled_head)
            explains = _explains_rare_rows(measurement, verdict, separate)
            loss = _loss(measurement, verdict, separate, with_gradient=with_gradient) if explains else None
    except Exception as error:  # the measurement that follows reports it
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            give_back_memory()
        return None
    return None if loss is None else _report(measurement, verdict, loss)


class _SeparateBatches:
    """The separate batches of a confirmation, which run as in training."""

    def __init__(self, measurement: Measurement, labelled_head: LabelledHead | None) -> None:
        self._measurement, self._head = measurement, labelled_head

    def losses(self, batch: Batch) -> dict[str, float]:
        """Return the means of a batch by term; attributes of modules are restored."""
        if self._head is None:
            return self._measurement.losses(batch)
        with preserve_attributes(self._measurement.model, *self._measurement.forward.modules):
            return {term: mean.item() for term, mean in self._at_labels(batch, NeededLogits.LABELLED).items()}

    def means(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return the means of a batch by term, with their graph; from logits in two chunks, if these are allowed."""
        if self._head is None:
            return self._measurement.means(batch)
        n_half = -(-len(self._head.positions.places(batch["labels"], None)) // 2) or 1
        with self._head.chunks_of(n_half):
            return self._at_labels(batch, NeededLogits.NONE)

    def _at_labels(self, batch: Batch, needs: NeededLogits) -> dict[str, Tensor]:
        forward = self._measurement.forward
        forward.labelled_head = self._head
        try:
            return forward(self._measurement.model, self._measurement.on_device(batch), None, needs)[0]
        finally:
            forward.labelled_head = None


def _explains_rare_rows(measurement: Measurement, verdict: Verdict, separate: _SeparateBatches) -> bool:
    """Return whether the count explains the loss of the rows with rare values, in eval mode.

    Each group runs in one batch, and in separate ones. If only labels are rare, they are those of common rows.
    """
    if measurement.knows_count:
        return True
    count = chosen_counts(measurement.ways(), {LOSS: verdict.way})[LOSS]
    sample, relabelled = measurement.sample, with_rare_labels(measurement.sample, measurement.item_counter.ignore_index)
    if relabelled is None:
        groups = [(group.together, _parts(group)) for group in sample.rare]
    else:
        groups = [(batch, list(sample.separate(batch, UNEQUAL))) for batch in relabelled]
    if not groups:
        return True
    with perturb_head(measurement.model):
        observed = (
            Observed(measurement.losses(together), [separate.losses(part) for part in parts], parts)
            for together, parts in groups
        )
        return all(each.difference(LOSS, count) <= EXPLAINED for each in observed)


def _parts(group: RowGroup) -> list[Batch]:
    """Return the first row of a group, which is a common one, and two parts of the others."""
    places = list(range(len(group.names)))
    return [group.take(part) for part in (places[:1], places[1::2], places[2::2]) if part]


def _loss(
    measurement: Measurement, verdict: Verdict, separate_batches: _SeparateBatches, *, with_gradient: bool
) -> float | None:
    """Return the loss of the rows in one batch; None if that of separate ones, or its gradient, differs."""
    sample, model, modules = measurement.sample, measurement.model, measurement.forward.modules
    counts = chosen_counts(measurement.ways(), {LOSS: verdict.way})
    losses: list[Mapping[str, float]] = []

    def recorded(run: Callable[[Batch], Mapping[str, Tensor]], batch: Batch) -> Mapping[str, Tensor]:
        found = run(batch)
        losses.append({term: mean.item() for term, mean in found.items()})
        return found

    separate = measurement.own_width or sample.separate(sample.together, UNEQUAL)
    in_one, in_parts = (partial(recorded, means) for means in (measurement.means, separate_batches.means))
    with perturb_head(model), DeterministicMode(model, True, {}, modules).passes():
        generators = Generators.now()
        if with_gradient:
            agrees = _gradients_agree(GradientCheck(model, in_one, counts, modules, in_parts), sample, separate)
        else:
            agrees = True
            for run, batch in ((in_one, sample.together), *((in_parts, part) for part in separate)):
                with preserve_buffers(model, *modules), preserve_attributes(model, *modules):
                    run(batch)
        if not agrees or not generators.unchanged() or any(found.keys() != {LOSS} for found in losses):
            return None
    first, *others = losses
    off = difference(first, others[: len(separate)], separate, LOSS, counts[LOSS])
    return first[LOSS] if math.isfinite(first[LOSS]) and off <= EXPLAINED else None


def _gradients_agree(check: GradientCheck, sample: Sample, separate: Sequence[Batch]) -> bool:
    """Return whether the gradient of separate batches is that of one, and neither 0 nor infinite."""
    reordered = None if sample.cut is None else sample.cut(sample.together, ([3, 2, 1, 0],))[0]
    joint = check.together(sample.together)
    if not math.isfinite(joint.norm()) or not joint.norm():
        return False
    return not check.difference(joint, sample.together, separate, reordered, 10 * EXPLAINED).off


def _report(measurement: Measurement, verdict: Verdict, loss: float) -> ExactnessReport:
    return ExactnessReport(
        ways={LOSS: verdict.way},
        measured=verdict.measured,
        shifts=verdict.shifts,
        explanation=Explanation({LOSS: 0.0}, 0.0, adds_up=False),
        in_training=InTraining({LOSS: 0.0}),
        joint={LOSS: loss},
        single_rows={LOSS: abs(loss)},
        parts=(),
        tolerance=EXPLAINED,
        sums=False,
        own_loss=measurement.forward.is_own,
        not_looked_at="" if measurement.knows_count else measurement.sample.not_looked_at,
    )
