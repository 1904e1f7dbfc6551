"""Settles how a model's loss is counted, and sees whether accumulating it is exact, before anything is trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ..runtime.module_attributes import preserve_attributes
from ..runtime.state_guards import gradient_hooks, inspection_mode
from .batch_changes import WatchedBatch, fresh_batch
from .deterministic_forward import DeterministicMode
from .forward import Forward
from .hidden_state import find_hidden_state
from .item_counts import Batch, CountItems, ItemCounter, counts_from_user
from .normalizer import means_of_sums
from .objective import Objective
from .perturbation import float32_weights, has_narrow_weights, perturb_head
from .probe import EXPLAINED, EXPLAINED_IN_HALF, Ways, cache_losses, choose, explain
from .report import ExactnessReport
from .sample import PAIRS, SINGLE, UNEQUAL, Sample
from .structure import ObservedPasses, check_means, terms_of, without_items
from .train_mode import TrainMode


def measured_objective(
    model: nn.Module,
    forward: Forward,
    sample: Sample,
    *,
    item_counter: ItemCounter,
    count_items: CountItems | None = None,
    sums: bool = False,
) -> Objective:
    """Settles how the loss is counted: by the user's `count_items`, by what is known of the loss, else by measurement;
    and measures in any case whether that explains the loss, in eval mode and in train mode, and whether padding
    matters to it.

    Some twenty forward passes of at most four rows; no parameter gets a gradient, and weights, modes, random-number
    states and buffers are put back. All processes take the main process's findings.

    Args:
        model: on its device, before it is wrapped.
        sums: whether the loss is handed over as a sum instead of a mean.
    """
    device = next(model.parameters()).device
    with inspection_mode(model):
        forward.settle_outputs(model, lambda: fresh_batch(sample.together, device))
        measurement = _Measurement(model, forward, sample, item_counter, count_items, sums)
        terms = terms_of(model, lambda batch: measurement.outputs(batch)[0], sample, count_items)
        measurement = replace(measurement, terms=terms)
        try:
            with float32_weights(model, *forward.modules) as widened:
                report = replace(measurement, prepared=widened).report(EXPLAINED)
        except RuntimeError:  # memory, or a model that insists on its type
            if not has_narrow_weights(model):
                raise
            report = measurement.report(EXPLAINED_IN_HALF)
    report, forward.factors = broadcast_object_list([report, forward.factors])
    chosen = _chosen(measurement.ways(), report.ways)
    return Objective(forward, lambda batch: {term: count(batch) for term, count in chosen.items()}, report)


def difference_of_packing(
    model: nn.Module, forward: Forward, objective: Objective, padded: Batch, packed: Batch
) -> float:
    """How far the loss of rows that lie one behind the other is from that of the same rows side by side, relative to
    the latter: more than rounding where the rows attend to each other. All processes take the main process's figure."""
    device = next(model.parameters()).device

    def loss(batch: Batch) -> float:
        counts = objective.count(batch)
        means, _ = forward(model, fresh_batch(batch, device))
        return sum(float(mean) * counts[term] for term, mean in means.items())

    with inspection_mode(model), float32_weights(model), perturb_head(model):
        off = abs(loss(packed) / loss(padded) - 1)
    (off,) = broadcast_object_list([off])
    return off


@dataclass(frozen=True)
class _Measurement:
    """What is measured on what; for the fields see `measured_objective`.

    Attributes:
        terms: of the loss, before it is taken apart.
        prepared: a batch → what the model takes.
        observed: what the passes show of the loss's structure.
    """

    model: nn.Module
    forward: Forward
    sample: Sample
    item_counter: ItemCounter
    count_items: CountItems | None
    sums: bool
    terms: Sequence[str] = ()
    prepared: Callable[[Batch], Batch] = lambda batch: batch
    observed: ObservedPasses = field(default_factory=ObservedPasses)

    def report(self, tolerance: float) -> ExactnessReport:
        """Measures. Differences up to `tolerance` are taken for rounding."""
        together, item_counter = self.sample.together, self.item_counter
        cut = None if self.sample.cut is None else (lambda batch: self.sample.apart(batch, UNEQUAL))
        collated = [] if self.sample.collated is None else self.sample.collated(UNEQUAL)
        apart = cut or (lambda _: collated)
        hidden = find_hidden_state(self.model, self.forward.modules, self._losses_together, tolerance)
        mode = self._deterministic_mode()
        ways = self.ways()
        with perturb_head(self.model):
            losses = cache_losses(self._losses)
            names = choose(losses, together, apart, ways, item_counter.ignore_index)
            # Of a count of the user's own it does not show whether labels are shifted; of the loss it does.
            every = dict.fromkeys(ways, item_counter.applicable(together))
            nearest = choose(losses, together, apart, every, item_counter.ignore_index)
            joint, alone = losses(together), [losses(row) for row in apart(together)[:2]]
            unlike = explain(losses, together, cut, collated, _chosen(ways, names), tolerance)
            # What no count explains looks at all tokens together, as far as one can say; so may what eval mode leaves
            # out.
            others = [part for part in self.forward.parts if unlike.differences[part] > tolerance or not joint[part]]
            names |= {part: list(item_counter.of_inputs(together))[-1] for part in others}
            every_term = _chosen(ways, names)
            empty = without_items(every_term, together)
            chosen = {term: count for term, count in every_term.items() if term not in empty}
            unlike = explain(losses, together, cut, collated, chosen, tolerance)
            train_mode = TrainMode(self.model, mode, self.sample, self._means, self._losses)
            in_training = train_mode.in_training(chosen, joint)
            off = max(hidden.off, *unlike.differences.values(), *in_training.differences.values(), in_training.drift)
            gradient = train_mode.gradient(every_term, exact=off <= tolerance, tolerance=10 * tolerance)
        losses = cache_losses(self._losses)
        check_means(losses, self.sample, every_term)
        explanation = unlike.worst(explain(losses, together, cut, collated, chosen, tolerance))
        unexplained = {t for t, off in explanation.differences.items() if off > tolerance}
        return ExactnessReport(
            ways=names,
            measured=len(ways[self.terms[0]]) > 1,
            shifts="labels after the shift" in nearest.values() and not self.sums,
            explanation=explanation.with_exact(empty),
            in_training=in_training.with_exact(empty),
            joint={term: 0.0 if term in empty else loss for term, loss in joint.items()},
            single_rows={term: max(abs(row[term]) for row in alone) for term in names},
            parts=self.forward.parts,
            tolerance=tolerance,
            sums=self.sums,
            own_loss=self.forward.is_own,
            absent_is_zero=self.observed.absent_is_zero(chosen, unexplained),
            counts_before_changes=self.observed.counts_before_changes(chosen, unexplained),
            gradient=gradient,
            gradient_hooks=gradient_hooks(self.model),
            hidden_state=hidden,
            unmeasured=[] if self.count_items or self.sums else [t for t in self.terms if t not in self.observed.shown],
        )

    def ways(self) -> Ways:
        """The ways to count that come into question for each term."""
        parts = dict.fromkeys(self.forward.parts, self.item_counter.applicable(self.sample.together))
        if self.count_items is not None:
            return {term: {"count_items": _of_term(self.count_items, term, self.terms)} for term in self.terms}
        if self.sums:
            name = self.item_counter.convention(self.sample.together)
        elif self.forward.counted_by is not None:
            name = self.forward.counted_by
        else:
            return dict.fromkeys(self.terms, self.item_counter.applicable(self.sample.together)) | parts
        return {term: {name: self.item_counter.ways[name]} for term in self.terms}

    def _losses(self, batch: Batch) -> dict[str, float]:
        with preserve_attributes(self.model, *self.forward.modules):
            found = self._means(batch)
        known = dict.fromkeys((*self.terms, *self.forward.parts), 0.0)
        return known | {term: mean.item() for term, mean in found.items()}

    def _losses_together(self) -> dict[str, float]:
        return {term: mean.item() for term, mean in self.outputs(self.sample.together)[0].items()}

    def _means(self, batch: Batch) -> dict[str, Tensor]:
        found = self.outputs(batch)[0]
        if not self.sums:
            return found
        ways = self.ways()  # one to count each term
        return means_of_sums(found, {term: next(iter(ways[term].values()))(batch) for term in found})

    def outputs(self, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        """Return the means of a batch by term, and the model's outputs."""
        watched = WatchedBatch(self._on_device(batch))
        try:
            found = self.forward(self.model, watched.batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # some models differentiate in their forward pass
            watched = WatchedBatch(self._on_device(batch))
            with torch.enable_grad():
                found = self.forward(self.model, watched.batch)
        self.observed.add(batch, watched, found[0], self.terms)
        return found

    def _on_device(self, batch: Batch) -> Batch:
        return self.prepared(fresh_batch(batch, next(self.model.parameters()).device))

    def _deterministic_mode(self) -> DeterministicMode:
        """How the model is run as in training; and on the way, in train mode, takes the loss apart."""
        outputs: Any = None

        def run() -> list[float]:
            nonlocal outputs
            with preserve_attributes(self.model, *self.forward.modules):
                means, outputs = self.outputs(self.sample.together)
            return [mean.item() for mean in means.values()]

        mode = DeterministicMode.of(self.model, run)
        # A count of the user's own is of the whole loss, and so is the one that a sum is divided by.
        if self.count_items is None and not self.sums and self.forward.may_have_parts(outputs):
            few = self.sample.apart(self.sample.together, PAIRS if mode.moving else SINGLE)
            with mode.passes():
                self.forward.take_apart(self.model, [self._on_device(batch) for batch in few])
        return mode


def _chosen(ways: Ways, names: Mapping[str, str]) -> dict[str, CountItems]:
    return {term: ways[term][name] for term, name in names.items()}


def _of_term(count_items: CountItems, term: str, terms: Sequence[str]) -> CountItems:
    return lambda batch: counts_from_user(count_items(batch), terms)[term]
