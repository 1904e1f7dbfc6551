"""Settles how a model's loss is counted, and sees whether accumulating it is exact, before anything is trained."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accelerate.utils import broadcast_object_list, send_to_device
from torch import Tensor, nn

from ..errors import DataError
from ..runtime.state_guards import inspection_mode, preserve_buffers
from .deterministic_forward import DeterministicMode
from .equal_draws import equal_draws
from .forward import Forward
from .item_counts import Batch, CountItems, ItemCounter, counts_from_user, rows_of
from .normalizer import means_of_sums
from .objective import Objective
from .perturbation import float32_weights, has_narrow_weights, perturb_head, perturb_norms
from .probe import EXPLAINED, EXPLAINED_IN_HALF, Ways, cache_losses, choose, difference, explain, relative
from .report import ExactnessReport, InTraining

Groups = Sequence[Sequence[int]]

# Four rows, apart: groups that differ in size tell ways to count apart. Batch norm cannot do with a single row.
_SINGLE, _UNEQUAL, _PAIRS = ([0], [1]), ([0], [1], [2, 3]), ([0, 1], [2, 3])
_UNCHANGED = 1e-6  # between two passes alike


@dataclass(frozen=True)
class Sample:
    """Four labelled rows to measure a loss on.

    Attributes:
        longest: the longest row of the data, for what it takes to fail now and not in the middle of training.
        together: the four rows.
        cut: such a batch in groups of rows, at its width; None where that cannot be done.
        collated: the rows in groups that are padded by themselves; None where that would give other rows, because the
            collator draws at random.
        names: what to call each of the four in a message.
    """

    longest: Batch
    together: Batch
    cut: Callable[[Batch, Groups], Sequence[Batch]] | None
    collated: Callable[[Groups], Sequence[Batch]] | None
    names: Sequence[str] = ()

    def apart(self, batch: Batch, groups: Groups) -> Sequence[Batch]:
        """A batch of the four rows in groups, at its width if that can be done."""
        if self.cut is not None:
            return self.cut(batch, groups)
        assert self.collated is not None, "rows are apart in one way at least"
        return self.collated(groups)


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
        means, _ = forward(model, send_to_device(sample.longest, device))
        measurement = _Measurement(model, forward, sample, item_counter, count_items, sums, tuple(means))
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
        means, _ = forward(model, send_to_device(batch, device))
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
    """

    model: nn.Module
    forward: Forward
    sample: Sample
    item_counter: ItemCounter
    count_items: CountItems | None
    sums: bool
    terms: Sequence[str]
    prepared: Callable[[Batch], Batch] = lambda batch: batch

    def report(self, tolerance: float) -> ExactnessReport:
        """Measures. Differences up to `tolerance` are taken for rounding."""
        together, item_counter = self.sample.together, self.item_counter
        cut = None if self.sample.cut is None else (lambda batch: self.sample.apart(batch, _UNEQUAL))
        collated = [] if self.sample.collated is None else self.sample.collated(_UNEQUAL)
        apart = cut or (lambda _: collated)
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
            chosen = _chosen(ways, names)
            unlike = explain(losses, together, cut, collated, chosen, tolerance)
            in_training = self._in_training(mode, chosen, joint)
        losses = cache_losses(self._losses)
        self._check_finite(losses, chosen)
        as_it_is = explain(losses, together, cut, collated, chosen, tolerance)
        return ExactnessReport(
            ways=names,
            measured=len(ways[self.terms[0]]) > 1,
            shifts="labels after the shift" in nearest.values() and not self.sums,
            explanation=unlike.worst(as_it_is),
            in_training=in_training,
            joint=joint,
            single_rows={term: max(abs(row[term]) for row in alone) for term in names},
            parts=self.forward.parts,
            tolerance=tolerance,
            sums=self.sums,
            own_loss=self.forward.is_own,
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
        found = self._outputs(batch)[0]
        if self.sums:  # there is one way to count each term then
            ways = self.ways()
            found = dict(means_of_sums(found, {t: next(iter(ways[t].values()))(batch) for t in found}))
        return {term: mean.item() for term, mean in found.items()}

    def _outputs(self, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        batch = self._on_device(batch)
        if any(module.training for module in self.model.modules()):
            return self.forward(self.model, batch)
        with equal_draws(rows_of(batch)):
            return self.forward(self.model, batch)

    def _on_device(self, batch: Batch) -> Batch:
        return self.prepared(send_to_device(batch, next(self.model.parameters()).device))

    def _deterministic_mode(self) -> DeterministicMode:
        """How the model is run as in training; and on the way, in train mode, takes the loss apart."""
        outputs: Any = None

        def run() -> list[float]:
            nonlocal outputs
            means, outputs = self._outputs(self.sample.together)
            return [mean.item() for mean in means.values()]

        mode = DeterministicMode.of(self.model, run)
        # A count of the user's own is of the whole loss, and so is the one that a sum is divided by.
        if self.count_items is None and not self.sums and self.forward.may_have_parts(outputs):
            few = self.sample.apart(self.sample.together, _PAIRS if mode.moving else _SINGLE)
            with mode.passes():
                self.forward.take_apart(self.model, [self._on_device(batch) for batch in few])
        return mode

    def _in_training(
        self, mode: DeterministicMode, chosen: Mapping[str, CountItems], in_eval: Mapping[str, float]
    ) -> InTraining:
        """Measures rows apart and together in train mode.

        Args:
            in_eval: the loss of all together in eval mode. Where train mode changes nothing and moves nothing, it mixes
                no rows either.
        """
        together, moving = self.sample.together, mode.moving

        def from_the_start(batch: Batch) -> dict[str, float]:
            with preserve_buffers(self.model):
                return self._losses(batch)

        with mode.passes(), perturb_norms(moving.values()):
            joint = from_the_start(together)
            if not moving and all(relative(joint[term], in_eval[term]) <= _UNCHANGED for term in chosen):
                return InTraining(dict.fromkeys(chosen, 0.0))
            apart = self.sample.apart(together, _PAIRS)
            means = [from_the_start(part) for part in apart]
            complaint = self._complaint_of_one_row() if moving else None
            once = self._losses(together)
            again = self._losses(together) if moving else once
            # The mean of a term without items is NaN, however often it is computed.
            with_items = [term for term in chosen if not math.isnan(once[term])]
        return InTraining(
            {term: difference(joint, means, apart, term, count) for term, count in chosen.items()},
            max((relative(again[term], once[term]) for term in with_items), default=0.0),
            [f"{type(module).__name__} {name!r}" for name, module in moving.items()],
            complaint,
        )

    def _complaint_of_one_row(self) -> str | None:
        # Batch norm cannot do with a single value.
        try:
            self._losses(self.sample.apart(self.sample.together, _SINGLE)[0])
        except ValueError as error:
            return str(error)
        return None

    def _check_finite(self, losses: Callable[[Batch], Mapping[str, float]], chosen: Mapping[str, CountItems]) -> None:
        together = self.sample.together

        def is_faulty(batch: Batch, term: str) -> bool:
            return not math.isfinite(losses(batch)[term]) and bool(chosen[term](batch))

        for term, loss in losses(together).items():
            if not is_faulty(together, term):
                continue
            singly = self.sample.apart(together, [[n] for n in range(len(self.sample.names))])
            named = zip(self.sample.names, singly, strict=True)
            # A row may have been taken more than once.
            faulty = list(dict.fromkeys(name for name, row in named if is_faulty(row, term)))
            are_some = 0 < len(faulty) < len(set(self.sample.names))
            looked_at = "in these rows" if are_some else "in the model's weights and in the rows"
            raise DataError(
                f"The {term} of {', '.join(faulty) if are_some else 'the first rows'} of `train_data` is {loss} before "
                f"any update. Look for numbers that are not finite {looked_at}."
            )


def _chosen(ways: Ways, names: Mapping[str, str]) -> dict[str, CountItems]:
    return {term: ways[term][name] for term, name in names.items()}


def _of_term(count_items: CountItems, term: str, terms: Sequence[str]) -> CountItems:
    return lambda batch: counts_from_user(count_items(batch), terms)[term]
