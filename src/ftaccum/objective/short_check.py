"""A short self-check: the losses of one batch and of separate ones, in train mode.

It confirms a cached verdict on the rows of this run. The one batch runs as the model does. The separate ones run as in
training, with logits at labelled positions only if an earlier run found that to be enough. Gradients are compared as
well, unless the run audits its first update, which compares them on rows of training.

Without a verdict, it finds the count of a model's own loss, if exactly one way to count explains these losses, and if
the run audits its first update.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..runtime.gradient_hooks import gradient_hooks
from ..runtime.memory import give_back_memory, is_out_of_memory
from ..runtime.module_attributes import preserve_attributes
from ..runtime.state_guards import Buffers, Generators
from ..runtime.written_weights import WrittenWeights
from .deterministic_forward import DeterministicMode
from .gradient_check import GradientCheck, backward
from .item_counts import AFTER_SHIFT, Batch, CountItems, relabelled, tensors_of
from .labelled_head import LabelledHead, NeededLogits
from .measurement import Measurement
from .own_loss import LOSS
from .perturbation import float32_weights, perturb_head
from .probe import EXPLAINED, Explanation, relative
from .rare_labels import with_rare_labels
from .recount import Observed
from .report import ExactnessReport, InTraining
from .sample import RowGroup
from .self_check_cache import Verdict
from .span_loss import is_span_loss
from .structure import ObservedPasses


def length_of_longest(measurement: Measurement) -> int:
    """Return the positions of the longest row."""
    return max((t.numel() for t in tensors_of(measurement.sample.longest)), default=0)


def confirmed(
    measurement: Measurement,
    verdict: Verdict,
    labelled_head: LabelledHead | None,
    *,
    with_gradient: bool,
) -> ExactnessReport | None:
    """Return the report that a verdict stands for, if the rows agree with it; else None.

    The rows run in train mode without random draws, once in one batch and once in separate ones, at their own widths.
    A longest row that is longer than the one that was run runs as well. So do rows with rare values, in eval mode: the
    key does not show that a loss weights or ignores some of them.

    Args:
        labelled_head: computes the logits of the separate batches, if the verdict says that it may; else None.
        with_gradient: whether to compare the gradient, too.
    """
    measurement = replace(measurement, terms=(LOSS,), observed=ObservedPasses())
    if verdict.way not in measurement.ways()[LOSS]:
        return None
    try:
        if length_of_longest(measurement) > verdict.longest:
            measurement.run_longest()
        with float32_weights(measurement.model, *measurement.forward.modules) as widened:
            measurement = replace(measurement, prepared=widened)
            separate = _SeparateBatches(measurement, labelled_head)
            explains = _explains_rare_rows(measurement, verdict, separate)
            loss = _loss(measurement, verdict, separate) if explains else None
            if with_gradient and loss is not None and not _gradients_agree(measurement, verdict, separate):
                return None
    except Exception as error:  # the measurement that follows reports it
        if is_out_of_memory(error):
            give_back_memory()
        return None
    return None if loss is None else _report(measurement, verdict, loss)


def found_in_losses(measurement: Measurement) -> ExactnessReport | None:
    """Return the report on a model's own loss that is one exact mean; None if a few losses do not show that it is.

    Run the longest row, and then the rows in train mode without random draws, once in one batch and once in separate
    ones, at their own widths. Exactly one way to count must explain these losses, and those of rare rows as well. The
    gradient is left to the audit of the first update.
    """
    model, forward = measurement.model, measurement.forward
    if not forward.is_own or measurement.count_items is not None or measurement.sums or gradient_hooks(model):
        return None
    measurement = replace(measurement, terms=(LOSS,), observed=ObservedPasses())
    try:
        _, outputs = measurement.outputs(measurement.sample.longest)
        if not isinstance(outputs, Mapping) or outputs.get(LOSS) is None:
            return None
        with float32_weights(model, *forward.modules) as widened:
            return _found(replace(measurement, prepared=widened))
    except Exception as error:  # the measurement that follows reports it
        if is_out_of_memory(error):
            give_back_memory()
        return None


def _found(measurement: Measurement) -> ExactnessReport | None:
    sample, separate = measurement.sample, _SeparateBatches(measurement, None)
    together, parts = sample.together, sample.parts
    if not _repeats(measurement, parts):
        return None
    observed = _observed(measurement, separate, together, parts)
    verdict = None if observed is None else _chosen(measurement, separate, observed)
    if observed is None or verdict is None or not _explains_rare_rows(measurement, verdict, separate):
        return None
    return _report(measurement, verdict, observed.joint[LOSS])


class _SeparateBatches:
    """The separate batches of a short check, which run as in training."""

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


def _repeats(measurement: Measurement, batches: Sequence[Batch]) -> bool:
    """Return whether a loss has a gradient, and is the same in a second pass after the backward pass.

    If not, the model keeps state outside its buffers, on which the next pass depends. The first batch with a loss is
    enough.

    Raises:
        SettingsError: if the backward pass fails.
    """
    model, modules = measurement.model, measurement.forward.modules
    with (
        perturb_head(model),
        DeterministicMode(model, True, {}, modules).passes(),
        preserve_attributes(model, *modules),
    ):
        for batch in batches:
            with torch.enable_grad():
                first = measurement.means(batch)[LOSS]
                if not math.isfinite(first.item()):  # the rows have no labels
                    continue
                if not first.requires_grad:
                    return False
                backward(first)
            return relative(measurement.means(batch)[LOSS].item(), first.item()) <= EXPLAINED
    return False


def _observed(
    measurement: Measurement, separate: _SeparateBatches, together: Batch, parts: Sequence[Batch]
) -> Observed | None:
    """Return the losses of rows in one batch and in separate ones; None if there is more to measure.

    That is so if a pass draws random numbers, moves buffers or writes to weights, and if the loss has several terms or
    is not finite. That of separate rows may be: a masked language model leaves some rows without labels.
    """
    model, modules = measurement.model, measurement.forward.modules
    with perturb_head(model), DeterministicMode(model, True, {}, modules).passes():
        generators, buffers, weights = Generators.now(), Buffers.of(model, *modules), WrittenWeights(model, *modules)
        with preserve_attributes(model, *modules):
            found, outputs = measurement.outputs(together)
        if measurement.forward.may_have_parts(outputs) or is_span_loss(outputs, found[LOSS], together):
            return None
        losses = [{term: mean.item() for term, mean in found.items()}]
        for part in parts:
            with preserve_attributes(model, *modules):
                losses.append({term: mean.item() for term, mean in separate.means(part).items()})
        if not generators.unchanged() or buffers.all_moved() or weights.found():
            return None
        if any(each.keys() != {LOSS} for each in losses):
            return None
    joint, *means = losses
    return Observed(joint, means, parts) if math.isfinite(joint[LOSS]) else None


def _chosen(measurement: Measurement, separate: _SeparateBatches, observed: Observed) -> Verdict | None:
    """Return the verdict that the loss is a mean by the way to count that explains it; None if none or several do.

    Ways that explain the rows equally well are compared again with other labels. If they explain these, too, the first
    one counts, as in the whole measurement.
    """
    ways, sample = measurement.ways()[LOSS], measurement.sample
    explains = lambda way, observed: _is_explained(observed, ways[way])
    found = [way for way in ways if explains(way, observed)]
    asking = relabelled(sample.together, measurement.item_counter.ignore_index) if len(found) > 1 else None
    if asking is not None:
        again = _observed(measurement, separate, asking, sample.separate(asking))
        found = [] if again is None else [way for way in found if explains(way, again)]
    return Verdict(found[0], len(ways) > 1, found[0] == AFTER_SHIFT, length_of_longest(measurement)) if found else None


def _is_explained(observed: Observed, count: CountItems) -> bool:
    """Return whether a count explains the losses, and rows without items have none; some heads return 0 for these."""
    pairs = zip(observed.parts, observed.means, strict=True)
    return observed.difference(LOSS, count) <= EXPLAINED and not any(
        math.isfinite(mean[LOSS]) for part, mean in pairs if not count(part)
    )


def _explains_rare_rows(measurement: Measurement, verdict: Verdict, separate: _SeparateBatches) -> bool:
    """Return whether the count explains the loss of the rows with rare values, in eval mode.

    Each group runs in one batch, and in separate ones. If only labels are rare, they are those of common rows.
    """
    if measurement.knows_count:
        return True
    sample, count = measurement.sample, measurement.ways()[LOSS][verdict.way]
    batches = with_rare_labels(sample, measurement.item_counter.ignore_index)
    if batches is None:
        groups = [(group.together, _parts_of(group)) for group in sample.rare]
    else:
        groups = [(batch, list(sample.separate(batch))) for batch in batches]
    if not groups:
        return True
    with perturb_head(measurement.model):
        observed = (
            Observed(measurement.losses(together), [separate.losses(part) for part in parts], parts)
            for together, parts in groups
        )
        return all(math.isfinite(each.joint[LOSS]) and each.difference(LOSS, count) <= EXPLAINED for each in observed)


def _parts_of(group: RowGroup) -> list[Batch]:
    """Return the first row of a group, which is a common one, and two parts of the others."""
    places = list(range(len(group.names)))
    return [group.take(part) for part in (places[:1], places[1::2], places[2::2]) if part]


def _loss(measurement: Measurement, verdict: Verdict, separate: _SeparateBatches) -> float | None:
    """Return the loss of the rows in one batch; None if that of separate ones differs."""
    observed = _observed(measurement, separate, measurement.sample.together, measurement.sample.parts)
    if observed is None or observed.difference(LOSS, measurement.ways()[LOSS][verdict.way]) > EXPLAINED:
        return None
    return observed.joint[LOSS]


def _gradients_agree(measurement: Measurement, verdict: Verdict, separate: _SeparateBatches) -> bool:
    """Return whether the gradient of separate batches is that of one, and neither 0 nor infinite."""
    sample, model, modules = measurement.sample, measurement.model, measurement.forward.modules
    counts = {LOSS: measurement.ways()[LOSS][verdict.way]}
    check = GradientCheck(model, measurement.means, counts, modules, separate.means)
    with perturb_head(model), DeterministicMode(model, True, {}, modules).passes():
        joint = check.together(sample.together)
        if not math.isfinite(joint.norm()) or not joint.norm():
            return False
        return not check.difference(joint, sample.together, sample.parts, sample.reordered, 10 * EXPLAINED).off


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
