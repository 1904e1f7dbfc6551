"""Settles how a model's loss is counted, before anything is trained."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, send_to_device
from torch import nn

from ..errors import DataError, InexactLossWarning
from ..side_effects import only_looking
from .counting import Batch, Counting, CountItems, counts_from_user
from .denominator import means_of_sums
from .forward import Forward
from .objective import Objective
from .probing import (
    EXPLAINED,
    EXPLAINED_IN_HALF,
    Cut,
    Explanation,
    Losses,
    Ways,
    choose,
    explain,
    in_float32,
    remembered,
    shaken,
)


@dataclass(frozen=True)
class Sample:
    """A few labelled rows to measure a loss on; see `probing.explain` for the fields. `longest` is the longest row of
    the data, for what it takes to fail now and not in the middle of training."""

    longest: Batch
    together: Batch
    cut: Cut | None
    padded_apart: Sequence[Batch]


@dataclass(frozen=True)
class _Findings:
    """What a measurement came to: by term the name of the way to count, whether logits predict the next label, and how
    well the ways explain the loss."""

    ways: dict[str, str]
    shifts: bool
    explanation: Explanation
    tolerance: float

    @property
    def unexplained(self) -> dict[str, float]:
        """The terms that are not one mean over countable items, with how far off they are."""
        return {term: off for term, off in self.explanation.differences.items() if off > self.tolerance}


def measured_objective(
    model: nn.Module,
    forward: Forward,
    sample: Sample,
    *,
    counting: Counting,
    count_items: CountItems | None = None,
    sums: bool = False,
) -> Objective:
    """Settles how the loss is counted: by the user's `count_items`, by what is known of the loss, else by measurement;
    and measures in any case whether that explains the loss, and whether padding matters to it.

    A few forward passes in eval mode, without gradients; weights, random-number states and buffers are put back.
    Batch norm, which mixes the rows of a batch in train mode alone, is not seen. All processes take the main
    process's findings.

    Args:
        model: on its device, before it is wrapped.
        sums: whether the loss is handed over as a sum instead of a mean.

    Warns:
        InexactLossWarning: where no way to count explains the loss.
    """
    device = next(model.parameters()).device
    with only_looking(model):
        terms = tuple(forward(model, send_to_device(sample.longest, device))[0])
        ways = _ways(terms, sample.together, forward, counting, count_items, sums)

        def losses(batch: Batch) -> dict[str, float]:
            found = forward(model, send_to_device(batch, device))[0]
            if sums:  # there is one way to count each term then
                found = dict(means_of_sums(found, {t: next(iter(ways[t].values()))(batch) for t in terms}))
            return {term: float(mean) for term, mean in found.items()}

        try:
            with in_float32(model):
                findings = _measure(model, losses, sample, ways, counting, EXPLAINED)
        except torch.OutOfMemoryError:
            findings = _measure(model, losses, sample, ways, counting, EXPLAINED_IN_HALF)
    (findings,) = broadcast_object_list([findings])
    if PartialState().is_main_process:
        _warn_of_unexplained(findings, sums)
    chosen = {term: ways[term][name] for term, name in findings.ways.items()}
    return Objective(
        forward,
        terms,
        lambda batch: {term: count(batch) for term, count in chosen.items()},
        counted_by=_in_words(findings, measured=len(ways[terms[0]]) > 1),
        shifts=findings.shifts and not sums,
        padding_sensitive=findings.explanation.padding_sensitive,
        sums=sums,
    )


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

    with only_looking(model), in_float32(model), shaken(model):
        difference = abs(loss(packed) / loss(padded) - 1)
    (difference,) = broadcast_object_list([difference])
    return difference


def _measure(
    model: nn.Module, losses: Losses, sample: Sample, ways: Ways, counting: Counting, tolerance: float
) -> _Findings:
    parts = sample.cut or (lambda _: sample.padded_apart)
    with shaken(model):
        shaken_losses = remembered(losses)
        names = choose(shaken_losses, sample.together, parts, ways, counting.ignore_index)
        # Of a count of the user's own it does not show whether labels are shifted; of the loss it does.
        every = dict.fromkeys(ways, counting.applicable(sample.together))
        nearest = choose(shaken_losses, sample.together, parts, every, counting.ignore_index)
        chosen = {term: ways[term][name] for term, name in names.items()}
        unlike = explain(shaken_losses, sample.together, sample.cut, sample.padded_apart, chosen, tolerance)
    losses = remembered(losses)
    _check_finite(losses(sample.together), chosen, sample.together)
    as_it_is = explain(losses, sample.together, sample.cut, sample.padded_apart, chosen, tolerance)
    shifts = set(nearest.values()) == {"labels after the shift"}
    return _Findings(names, shifts, unlike.worst(as_it_is), tolerance)


def _check_finite(losses: Mapping[str, float], chosen: Mapping[str, CountItems], batch: Batch) -> None:
    for term, loss in losses.items():
        if not math.isfinite(loss) and chosen[term](batch):
            raise DataError(
                f"The {term} of the first rows of `train_data` is {loss} before any update. Look for numbers that are "
                "not finite in the model's weights and in the rows."
            )


def _ways(
    terms: Sequence[str],
    sample: Batch,
    forward: Forward,
    counting: Counting,
    count_items: CountItems | None,
    sums: bool,
) -> Ways:
    """The ways to count that come into question for each term."""
    if count_items is not None:
        return {term: {"count_items": _of_term(count_items, term, terms)} for term in terms}
    if sums:
        name = counting.convention(sample)
    elif forward.counted_by is not None:
        name = forward.counted_by
    else:
        return dict.fromkeys(terms, counting.applicable(sample))
    return {term: {name: counting.ways[name]} for term in terms}


def _of_term(count_items: CountItems, term: str, terms: Sequence[str]) -> CountItems:
    return lambda batch: counts_from_user(count_items(batch), terms)[term]


def _in_words(findings: _Findings, measured: bool) -> str:
    ways = findings.ways
    words = ", ".join(ways.values() if len(ways) == 1 else (f"{way} for {term!r}" for term, way in ways.items()))
    if findings.unexplained:
        return f"{words}, the nearest, which it is NOT exactly (see the warning)"
    return f"{words} (measured)" if measured else words


def _warn_of_unexplained(findings: _Findings, sums: bool) -> None:
    if not findings.unexplained:
        return
    clauses = "; ".join(
        f"{term!r} of rows apart, weighted by {findings.ways[term]}, is up to {100 * off:.2g}% off that of all together"
        for term, off in findings.unexplained.items()
    )
    cure = (
        "The parts add up, so the loss is a sum: say so with `reduction='sum'`."
        if findings.explanation.adds_up and not sums
        else "Accumulating it only approximates one large batch. Losses that compare the rows of a batch with each "
        "other do this; where yours is a mean over items of your own, give `count_items`."
    )
    warnings.warn(f"The loss is not a mean over countable items: {clauses}. {cure}", InexactLossWarning, stacklevel=3)
