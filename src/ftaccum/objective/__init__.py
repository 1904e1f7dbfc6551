"""The objective: from a model and a micro-batch to mean losses and loss items. It alone owns the denominator."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, send_to_device
from torch import nn

from ..errors import InexactLossWarning
from ..side_effects import only_looking
from .counting import IGNORE_INDEX, Batch, Counting, CountItems, counts_from_user, targets_of
from .denominator import Counts, Denominator, ItemMeans, Means, gathered, means_of_sums, total
from .forward import LOSS, Forward, LossFn, accepted_arguments, is_label, logits_of
from .probing import EXPLAINED, EXPLAINED_IN_HALF, Explanation, choose, explain, in_float32, shaken

__all__ = [
    "IGNORE_INDEX",
    "LOSS",
    "Batch",
    "CountItems",
    "Counting",
    "Counts",
    "Denominator",
    "Forward",
    "ItemMeans",
    "LossFn",
    "Objective",
    "Sample",
    "accepted_arguments",
    "gathered",
    "is_label",
    "logits_of",
    "targets_of",
    "total",
]


@dataclass(frozen=True)
class Sample:
    """A few labelled rows to measure a loss on; see `probing.explain` for the fields."""

    together: Batch
    cut: Callable[[Batch], Sequence[Batch]] | None
    padded_apart: Sequence[Batch]


class Objective:
    """What is minimised: named mean losses, and how many items each is a mean over.

    Attributes:
        terms: the names of the means.
        count: a collated batch → its loss items, by term.
        counted_by: what the items are, in words.
        shifts: whether the logits at one position predict the label at the next.
        padding_sensitive: whether a window's rows must be padded to one width.
    """

    def __init__(
        self,
        forward: Forward,
        terms: Sequence[str],
        count: Callable[[Batch], Counts],
        *,
        counted_by: str,
        shifts: bool = False,
        padding_sensitive: bool = False,
        sums: bool = False,
    ) -> None:
        self._forward = forward
        self.counted_by = counted_by
        self.shifts = shifts
        self._sums = sums
        self.terms = tuple(terms)
        self.count = count
        self.padding_sensitive = padding_sensitive

    @classmethod
    def measured(
        cls,
        model: nn.Module,
        forward: Forward,
        sample: Sample,
        *,
        counting: Counting,
        count_items: CountItems | None = None,
        sums: bool = False,
    ) -> "Objective":
        """Settles how the loss is counted: by the user's `count_items`, by what is known of the loss, else by
        measurement; and measures in any case whether that explains the loss, and whether padding matters to it.

        A few forward passes in eval mode, without gradients; weights, random-number states and buffers are put
        back. Batch norm, which mixes the rows of a batch in train mode alone, is not seen. All processes take the
        main process's findings.

        Args:
            model: on its device, before it is wrapped.
            sums: whether the loss is handed over as a sum instead of a mean.

        Warns:
            InexactLossWarning: where no way to count explains the loss.
        """
        device = next(model.parameters()).device
        with only_looking(model):
            terms = tuple(forward(model, send_to_device(sample.together, device))[0])
            measured = counting.applicable(sample.together)
            ways = _ways(terms, measured, sample.together, forward, counting, count_items, sums)

            def losses(batch: Batch) -> dict[str, float]:
                found = forward(model, send_to_device(batch, device))[0]
                if sums:
                    found = dict(means_of_sums(found, {t: next(iter(ways[t].values()))(batch) for t in terms}))
                return {term: float(mean) for term, mean in found.items()}

            def measure(tolerance: float) -> tuple[dict[str, str], bool, Explanation]:
                parts = sample.cut or (lambda _: sample.padded_apart)
                explained = lambda chosen: explain(
                    losses, sample.together, sample.cut, sample.padded_apart, chosen, tolerance
                )
                with shaken(model):
                    names = choose(losses, sample.together, parts, ways, counting.ignore_index)
                    chosen = {term: ways[term][name] for term, name in names.items()}
                    everything = dict.fromkeys(terms, measured)
                    nearest = choose(losses, sample.together, parts, everything, counting.ignore_index)
                    shifts = not sums and set(nearest.values()) == {"labels after the shift"}
                    unlike = explained(chosen)
                return names, shifts, unlike.worst(explained(chosen))

            try:
                tolerance = EXPLAINED
                with in_float32(model):
                    findings = measure(tolerance)
            except torch.OutOfMemoryError:
                tolerance = EXPLAINED_IN_HALF
                findings = measure(tolerance)
        ((names, shifts, explanation),) = broadcast_object_list([findings])
        if PartialState().is_main_process:
            _warn_of_unexplained(names, explanation, tolerance, sums)
        chosen = {term: ways[term][name] for term, name in names.items()}
        return cls(
            forward,
            terms,
            lambda batch: {term: count(batch) for term, count in chosen.items()},
            counted_by=_in_words(names, measured=len(ways[terms[0]]) > 1),
            shifts=shifts,
            padding_sensitive=explanation.padding_sensitive,
            sums=sums,
        )

    def means(self, model: nn.Module, batch: Batch, counts: Counts, terms: Sequence[str]) -> tuple[Means, Any]:
        """The means of these terms over the batch's own items, and the model's outputs.

        Args:
            counts: the batch's items by term.
            terms: those that the batch has items of; the mean of any other would be NaN.
        """
        found, outputs = self._forward(model, batch)
        means = means_of_sums(found, counts) if self._sums else found
        return {term: means[term] for term in terms}, outputs


def _ways(
    terms: Sequence[str],
    measured: Mapping[str, CountItems],
    sample: Batch,
    forward: Forward,
    counting: Counting,
    count_items: CountItems | None,
    sums: bool,
) -> Mapping[str, Mapping[str, CountItems]]:
    """The ways to count that come into question for each term."""
    if count_items is not None:
        return {term: {"count_items": _of_term(count_items, term, terms)} for term in terms}
    if sums:
        name = counting.convention(sample)
    elif forward.counted_by is not None:
        name = forward.counted_by
    else:
        return dict.fromkeys(terms, measured)
    return {term: {name: counting.ways[name]} for term in terms}


def _of_term(count_items: CountItems, term: str, terms: Sequence[str]) -> CountItems:
    return lambda batch: counts_from_user(count_items(batch), terms)[term]


def _in_words(ways: Mapping[str, str], measured: bool) -> str:
    words = ", ".join(ways.values() if len(ways) == 1 else (f"{way} for {term!r}" for term, way in ways.items()))
    return f"{words} (measured)" if measured else words


def _warn_of_unexplained(ways: Mapping[str, str], explanation: Explanation, tolerance: float, sums: bool) -> None:
    unexplained = {term: off for term, off in explanation.differences.items() if off > tolerance}
    if not unexplained:
        return
    clauses = "; ".join(
        f"{term!r} of rows apart, weighted by {ways[term]}, is up to {100 * off:.2g}% off that of them together"
        for term, off in unexplained.items()
    )
    cure = (
        "The parts add up, so the loss is a sum: say so with `reduction='sum'`."
        if explanation.adds_up and not sums
        else "Accumulating it only approximates one large batch. Losses that compare the rows of a batch with each "
        "other do this; where yours is a mean over items of your own, give `count_items`."
    )
    warnings.warn(f"The loss is not a mean over countable items: {clauses}. {cure}", InexactLossWarning, stacklevel=3)
