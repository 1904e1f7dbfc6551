"""Measure how to count a loss and whether accumulating it is exact, before training."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ..runtime.gradient_hooks import gradient_hooks
from ..runtime.module_attributes import preserve_attributes
from ..runtime.process_group import of_main_process
from ..runtime.state_guards import inspection_mode
from .batch_changes import WatchedBatch, fresh_batch
from .deterministic_forward import DeterministicMode
from .equal_draws import equal_draws
from .forward import Forward
from .hidden_state import find_hidden_state
from .item_counts import OF_USER, Batch, CountItems, ItemCounter, counts_from_user, rows_of
from .normalizer import means_of_sums
from .objective import Objective
from .perturbation import float32_weights, has_narrow_weights, perturb_head
from .probe import EXPLAINED, EXPLAINED_IN_HALF, Cut, Explanation, Losses, Ways, cache_losses, choose, explain
from .recount import Observed, RareCheck, Recount
from .report import ExactnessReport
from .router_check import find_router_terms
from .sample import PAIRS, SINGLE, UNEQUAL, Sample
from .span_loss import WITHIN, span_counts
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
    balances_window: bool = False,
) -> Objective:
    """Decide how to count the loss, and measure whether accumulating it is exact.

    The count is the user's `count_items`, or follows from what is known about the loss, or is measured. In any case,
    measure whether it explains the loss, in eval mode and in train mode, and whether padding matters.

    This takes some twenty forward passes of at most four rows. No parameter gets a gradient; weights, modes,
    random-number states and buffers are restored. All processes use the main process's findings.

    Args:
        model: the model on its device, before it is wrapped.
        forward: its forward pass with the loss.
        sample: the rows to measure on.
        item_counter: the ways to count.
        count_items: the user's way to count, if there is one.
        sums: whether the loss is given as a sum instead of a mean.
        balances_window: whether to compute the balance of a mixture of experts over all tokens of a window, if its
            formula is known.
    """
    device = next(model.parameters()).device
    with inspection_mode(model, *forward.modules):
        forward.settle_outputs(model, lambda: fresh_batch(sample.together, device))
        if count_items is None:
            forward.split_spans(model, fresh_batch(sample.together, device))
        measurement = _Measurement(model, forward, sample, item_counter, count_items, sums)
        terms = terms_of(model, lambda batch: measurement.outputs(batch)[0], sample, count_items)
        measurement = replace(measurement, terms=terms)
        try:
            with float32_weights(model, *forward.modules) as widened:
                report = replace(measurement, prepared=widened).report(EXPLAINED)
        except RuntimeError:  # memory ran out, or the model needs its own type
            if not has_narrow_weights(model):
                raise
            report = measurement.report(EXPLAINED_IN_HALF)
    report, forward.factors = of_main_process((report, forward.factors))
    chosen = _chosen(measurement.ways(), report.ways, report.own_rules)
    window = find_router_terms(model, forward, sample) if balances_window and report.parts else None
    if window is not None:
        report = report.over_whole_window(window.names, window.padding)
    return Objective(forward, lambda batch: {term: count(batch) for term, count in chosen.items()}, report, window)


@dataclass(frozen=True)
class _Measurement:
    """A measurement of a loss; for the other fields see `measured_objective`.

    Attributes:
        terms: the terms of the loss, before terms that the model adds up are split off.
        prepared: converts a batch to the types that the model takes.
        observed: a record of the passes.
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
        """Measure the loss; differences up to `tolerance` count as rounding."""
        hidden = find_hidden_state(self.model, self.forward.modules, self._losses_together, tolerance)
        mode = self._deterministic_mode()
        with perturb_head(self.model):
            losses = cache_losses(self._losses)
            counts = self._count(losses, tolerance)
            joint, alone = losses(self.sample.together), [losses(row) for row in self._apart(self.sample.together)[:2]]
            unlike = self._explain(losses, counts.with_items, tolerance).with_differences(
                {term: recount.difference for term, recount in counts.recounts.items()}
            )
            train_mode = TrainMode(self.model, mode, self.sample, self._means, self._losses)
            in_training = train_mode.in_training(counts.with_items, joint)
            off = max(hidden.off, *unlike.differences.values(), *in_training.differences.values(), in_training.drift)
            gradient = train_mode.gradient(counts.by_term, exact=off <= tolerance, tolerance=10 * tolerance)
        explanation = unlike.worst(self._explain_as_it_is(counts, tolerance))
        unexplained = {term for term, off in explanation.differences.items() if off > tolerance}
        measures = self.count_items is None and not self.sums
        return ExactnessReport(
            ways=counts.names,
            measured=len(self.ways()[self.terms[0]]) > 1,
            shifts=counts.shifts and not self.sums,
            explanation=explanation.with_exact(counts.empty),
            in_training=in_training.with_exact(counts.empty),
            joint={term: 0.0 if term in counts.empty else loss for term, loss in joint.items()},
            single_rows={term: max(abs(row[term]) for row in alone) for term in counts.names},
            parts=self.forward.parts,
            tolerance=tolerance,
            sums=self.sums,
            own_loss=self.forward.is_own,
            absent_is_zero=self.observed.absent_is_zero(counts.with_items, unexplained),
            counts_before_changes=self.observed.counts_before_changes(counts.with_items, unexplained),
            gradient=gradient,
            gradient_hooks=gradient_hooks(self.model),
            hidden_state=hidden,
            unmeasured=[term for term in self.terms if term not in self.observed.shown] if measures else [],
            own_rules=counts.own_rules,
            at_fault={term: recount.at_fault for term, recount in counts.recounts.items() if recount.at_fault},
            not_looked_at="" if self._knows_count else self.sample.not_looked_at,
        )

    def _count(self, losses: Losses, tolerance: float) -> "_Counts":
        """Choose how to count each term."""
        together, item_counter, ways = self.sample.together, self.item_counter, self.ways()
        names = choose(losses, together, self._apart, ways, item_counter.ignore_index)
        # The user's count does not show whether labels are shifted, but the loss does.
        every = dict.fromkeys(ways, item_counter.applicable(together))
        nearest = choose(losses, together, self._apart, every, item_counter.ignore_index)
        unlike = self._explain(losses, _chosen(ways, names), tolerance)
        # A term that no count explains probably looks at all tokens together. So may a term that eval mode leaves out.
        parts = self.forward.parts
        others = [part for part in parts if unlike.differences[part] > tolerance or not losses(together)[part]]
        names |= {part: list(item_counter.of_inputs(together))[-1] for part in others}
        recounts: dict[str, Recount] = {}
        if tolerance <= EXPLAINED and not self._knows_count:
            recounts = self._rare_check(losses).recounts({term: names[term] for term in self.terms}, ways, tolerance)
        names |= {term: recount.name for term, recount in recounts.items()}
        own_rules = {term: recount.count for term, recount in recounts.items() if recount.name not in ways[term]}
        by_term = _chosen(ways, names, own_rules)
        shifts = "labels after the next-token shift" in nearest.values()
        return _Counts(names, by_term, without_items(by_term, together), recounts, own_rules, shifts)

    def _explain(self, losses: Losses, chosen: Mapping[str, CountItems], tolerance: float) -> Explanation:
        return explain(losses, self.sample.together, self._cut, self._collated, chosen, tolerance)

    def _explain_as_it_is(self, counts: "_Counts", tolerance: float) -> Explanation:
        """Explain the loss with the model's own weights, without noise on its head."""
        losses = cache_losses(self._losses)
        check_means(losses, self.sample, counts.by_term)
        explanation = self._explain(losses, counts.with_items, tolerance)
        if not counts.own_rules:
            return explanation
        check = self._rare_check(losses)
        return explanation.with_differences(
            {term: check.difference(term, count) for term, count in counts.own_rules.items()}
        )

    @property
    def _cut(self) -> Cut | None:
        return None if self.sample.cut is None else lambda batch: self.sample.separate(batch, UNEQUAL)

    @property
    def _collated(self) -> Sequence[Batch]:
        return [] if self.sample.collated is None else self.sample.collated(UNEQUAL)

    def _apart(self, batch: Batch) -> Sequence[Batch]:
        """Return the rows in groups of unequal size, at the width of the batch if possible."""
        return self.sample.separate(batch, UNEQUAL)

    def _rare_check(self, losses: Losses) -> RareCheck:
        together = self.sample.together
        first = Observed.of(losses, together, self._apart(together))
        return RareCheck(losses, first, self.sample, self.item_counter.ignore_index)

    @property
    def _knows_count(self) -> bool:
        if self.count_items is not None:
            return False  # the user's count may be wrong
        return self.sums or self.forward.has_spans or self.forward.counted_by is not None

    def ways(self) -> Ways:
        """Return the ways to count that are possible for each term."""
        parts = dict.fromkeys(self.forward.parts, self.item_counter.applicable(self.sample.together))
        if self.count_items is not None:
            return {term: {OF_USER: _of_term(self.count_items, term, self.terms)} for term in self.terms}
        if self.forward.has_spans:
            return {term: {WITHIN: count} for term, count in span_counts().items()}
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
        ways = self.ways()  # exactly one for each term
        return means_of_sums(found, {term: next(iter(ways[term].values()))(batch) for term in found})

    def outputs(self, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        """Return the means of a batch by term, and the model's outputs."""
        watched = WatchedBatch(self._on_device(batch))
        trains = any(module.training for module in self.model.modules())
        with nullcontext() if trains else equal_draws(rows_of(batch)):
            found = self.forward(self.model, watched.batch)
        self.observed.add(batch, watched, found[0], self.terms)
        return found

    def _on_device(self, batch: Batch) -> Batch:
        return self.prepared(fresh_batch(batch, next(self.model.parameters()).device))

    def _deterministic_mode(self) -> DeterministicMode:
        """Return how to run the model as in training, and split off the terms that its loss adds up in train mode."""
        outputs: Any = None

        def run() -> list[float]:
            nonlocal outputs
            with preserve_attributes(self.model, *self.forward.modules):
                means, outputs = self.outputs(self.sample.together)
            return [mean.item() for mean in means.values()]

        mode = DeterministicMode.of(self.model, run, self.forward.modules)
        # The user's count is of the whole loss, and so is the count that divides a sum.
        if self.count_items is None and not self.sums and self.forward.may_have_parts(outputs):
            few = self.sample.separate(self.sample.together, PAIRS if mode.moving else SINGLE)
            with mode.passes():
                self.forward.take_apart(self.model, [self._on_device(batch) for batch in few])
        return mode


@dataclass(frozen=True)
class _Counts:
    """How each term is counted.

    Attributes:
        names: the names of the counts.
        by_term: the counts themselves.
        empty: the terms without items in the first rows.
        recounts: the counts of all terms after the check on rare rows, if there was one.
        own_rules: the counts that are none of the named ways, because the loss has a rule of its own.
        shifts: whether logits predict the next label.
    """

    names: dict[str, str]
    by_term: dict[str, CountItems]
    empty: Sequence[str]
    recounts: Mapping[str, Recount]
    own_rules: Mapping[str, CountItems]
    shifts: bool

    @property
    def with_items(self) -> dict[str, CountItems]:
        """The counts of the terms with items in the first rows."""
        return {term: count for term, count in self.by_term.items() if term not in self.empty}


def _chosen(
    ways: Ways, names: Mapping[str, str], own_rules: Mapping[str, CountItems] | None = None
) -> dict[str, CountItems]:
    own_rules = own_rules or {}
    return {term: own_rules[term] if term in own_rules else ways[term][name] for term, name in names.items()}


def _of_term(count_items: CountItems, term: str, terms: Sequence[str]) -> CountItems:
    return lambda batch: counts_from_user(count_items(batch), terms)[term]
