"""A measurement of a loss: its count, and the differences that are left between one batch and separate ones."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from ..runtime.gradient_hooks import gradient_hooks
from ..runtime.module_attributes import preserve_attributes
from .batch_changes import WatchedBatch, fresh_batch_for
from .deterministic_forward import DeterministicMode
from .equal_draws import equal_draws
from .forward import Forward
from .hidden_state import HiddenState
from .item_counts import AFTER_SHIFT, OF_USER, Batch, CountItems, ItemCounter
from .measured_counts import MeasuredCounts, chosen_counts, count_of_term
from .normalizer import means_of_sums
from .perturbation import perturb_head
from .probe import EXPLAINED, Explanation, Losses, Ways, cache_losses, choose, explain
from .recount import Observed, RareCheck, Recount
from .report import ExactnessReport
from .sample import Sample
from .span_loss import WITHIN, span_counts
from .structure import ObservedPasses, check_means, without_items
from .train_mode import TrainMode

T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """A measurement of a loss; for the other fields see `measured_objective`.

    Attributes:
        prepared: converts a batch to the types that the model takes.
        observed: a record of the passes.
        terms: the terms of the loss, before terms that the model adds up are split off.
        first: the losses of the rows in one batch in eval mode.
        mode: how to run the model as in training.
        hidden: the state that a pass leaves behind outside buffers.
    """

    model: nn.Module
    forward: Forward
    sample: Sample
    item_counter: ItemCounter
    count_items: CountItems | None
    sums: bool
    prepared: Callable[[Batch], Batch] = lambda batch: batch
    observed: ObservedPasses = field(default_factory=ObservedPasses)
    terms: Sequence[str] = ()
    first: Mapping[str, float] = field(default_factory=dict)
    mode: DeterministicMode | None = None
    hidden: HiddenState = HiddenState()

    def run_longest(self) -> list[str]:
        """Run the longest row, in the types of training, and return the terms of its loss."""
        if self.forward.is_own:  # which output is the loss shows on several rows only
            self._run(self.sample.longest, self.forward.outputs)
            return []
        return list(self.outputs(self.sample.longest)[0])

    def report(self, tolerance: float) -> ExactnessReport:
        """Measure the loss; differences up to `tolerance` count as rounding."""
        assert self.mode is not None, "the check found it"
        with perturb_head(self.model):
            losses = cache_losses(self.losses)
            counts = self._count(losses, tolerance)
            together = self.sample.together
            joint, alone = losses(together), [losses(row) for row in self.sample.separate(together)[:2]]
            unlike = self._explain(losses, counts.with_items, tolerance).with_differences(
                {term: recount.difference for term, recount in counts.recounts.items()}
            )
            train_mode = TrainMode(self.model, self.mode, self.sample, self.means, self.losses)
            gradient_together = train_mode.gradient_together(counts.by_term)
            known = None if gradient_together is None else gradient_together.losses
            in_training = train_mode.in_training(counts.with_items, joint, known)
            off = max(
                self.hidden.off, *unlike.differences.values(), *in_training.differences.values(), in_training.drift
            )
            compared = gradient_together if off <= tolerance else None
            gradient = train_mode.gradient(compared, counts.by_term, 10 * tolerance)
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
            hidden_state=self.hidden,
            unmeasured=[term for term in self.terms if term not in self.observed.shown] if measures else [],
            own_rules=counts.own_rules,
            at_fault={term: recount.at_fault for term, recount in counts.recounts.items() if recount.at_fault},
            not_looked_at="" if self.knows_count else self.sample.not_looked_at,
        )

    def _count(self, losses: Losses, tolerance: float) -> MeasuredCounts:
        """Choose how to count each term."""
        together, item_counter, ways = self.sample.together, self.item_counter, self.ways()
        names = choose(losses, together, self.sample.separate, ways, item_counter.ignore_index)
        # The user's count does not show whether labels are shifted, but the loss does.
        every = dict.fromkeys(ways, item_counter.applicable(together))
        nearest = choose(losses, together, self.sample.separate, every, item_counter.ignore_index)
        unlike = self._explain(losses, chosen_counts(ways, names), tolerance)
        # A term that no count explains probably looks at all tokens together. So may a term that eval mode leaves out.
        parts = self.forward.parts
        others = [part for part in parts if unlike.differences[part] > tolerance or not losses(together)[part]]
        names |= {part: list(item_counter.of_inputs(together))[-1] for part in others}
        recounts: dict[str, Recount] = {}
        if tolerance <= EXPLAINED and not self.knows_count:
            recounts = self._rare_check(losses).recounts({term: names[term] for term in self.terms}, ways, tolerance)
        names |= {term: recount.name for term, recount in recounts.items()}
        own_rules = {term: recount.count for term, recount in recounts.items() if recount.name not in ways[term]}
        by_term = chosen_counts(ways, names, own_rules)
        shifts = AFTER_SHIFT in nearest.values()
        return MeasuredCounts(names, by_term, without_items(by_term, together), recounts, own_rules, shifts)

    def _explain(self, losses: Losses, chosen: Mapping[str, CountItems], tolerance: float) -> Explanation:
        cut = None if self.sample.cut is None else self.sample.separate
        return explain(losses, self.sample.together, cut, self.sample.own_width, chosen, tolerance)

    def _explain_as_it_is(self, counts: MeasuredCounts, tolerance: float) -> Explanation:
        """Explain the loss with the model's own weights, without noise on its head."""
        known = [] if self.forward.factors or self.sums else [(self.sample.together, self._with_all_terms(self.first))]
        losses = cache_losses(self.losses, known)
        check_means(losses, self.sample, counts.by_term)
        explanation = self._explain(losses, counts.with_items, tolerance)
        if not counts.own_rules:
            return explanation
        check = self._rare_check(losses)
        return explanation.with_differences(
            {term: check.difference(term, count) for term, count in counts.own_rules.items()}
        )

    def _rare_check(self, losses: Losses) -> RareCheck:
        together = self.sample.together
        first = Observed.of(losses, together, self.sample.separate(together))
        return RareCheck(losses, first, self.sample, self.item_counter.ignore_index)

    @property
    def knows_count(self) -> bool:
        """Whether the count need not be measured."""
        if self.count_items is not None:
            return False  # the user's count may be wrong
        return self.sums or self.forward.has_spans or self.forward.counted_by is not None

    def ways(self) -> Ways:
        """Return the ways to count that are possible for each term."""
        parts = dict.fromkeys(self.forward.parts, self.item_counter.applicable(self.sample.together))
        if self.count_items is not None:
            return {term: {OF_USER: count_of_term(self.count_items, term, self.terms)} for term in self.terms}
        if self.forward.has_spans:
            return {term: {WITHIN: count} for term, count in span_counts().items()}
        if self.sums:
            name = self.item_counter.convention(self.sample.together)
        elif self.forward.counted_by is not None:
            name = self.forward.counted_by
        else:
            return dict.fromkeys(self.terms, self.item_counter.applicable(self.sample.together)) | parts
        return {term: {name: self.item_counter.ways[name]} for term in self.terms}

    def losses(self, batch: Batch) -> dict[str, float]:
        """Return the means of a batch by term, and 0 for terms that it lacks; attributes of modules are restored."""
        with preserve_attributes(self.model, *self.forward.modules):
            found = self.means(batch)
        return self._with_all_terms({term: mean.item() for term, mean in found.items()})

    def _with_all_terms(self, losses: Mapping[str, float]) -> dict[str, float]:
        return {**dict.fromkeys((*self.terms, *self.forward.parts), 0.0), **losses}

    def means(self, batch: Batch) -> dict[str, Tensor]:
        """Return the means of a batch by term; those of a loss that is given as a sum, too."""
        found = self.outputs(batch)[0]
        if not self.sums:
            return found
        ways = self.ways()  # exactly one for each term
        return means_of_sums(found, {term: next(iter(ways[term].values()))(batch) for term in found})

    def outputs(self, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        """Return the means of a batch by term, and the model's outputs."""
        found, watched = self._run(batch, self.forward)
        self.observed.add(batch, watched, found[0], self.terms)
        return found

    def first_pass(self) -> tuple[dict[str, float], Any]:
        """Return the losses of the rows in one batch in eval mode, and the outputs; find the loss among them."""
        together = self.sample.together

        def first_means(model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], Any]:
            again = lambda: self.on_device(together)
            return self.forward.first_means(model, batch, again, may_split=self.count_items is None)

        with preserve_attributes(self.model, *self.forward.modules):
            (means, outputs), watched = self._run(together, first_means)
        self.observed.add(together, watched, means, self.terms)
        return {term: mean.item() for term, mean in means.items()}, outputs

    def _run(self, batch: Batch, run: Callable[[nn.Module, Batch], T]) -> tuple[T, WatchedBatch]:
        """Run a pass on a copy of a batch; in eval mode with equal random draws for all rows."""
        watched = WatchedBatch(self.on_device(batch))
        with equal_draws(self.model, batch):
            return run(self.model, watched.batch), watched

    def on_device(self, batch: Batch) -> Batch:
        """Return a copy of a batch on the device, in the types that the model takes."""
        return self.prepared(fresh_batch_for(self.model, batch))
