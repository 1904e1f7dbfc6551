"""The objective: from a model and a micro-batch to mean losses and loss items. It alone owns the denominator."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, send_to_device
from torch import nn

from ..errors import InexactLossWarning
from ..side_effects import only_looking
from .counting import IGNORE_INDEX, Batch, Counting, CountItems, counts_from_user, targets_of
from .denominator import Counts, Denominator, ItemMeans, Means, gathered, means_of_sums, total
from .forward import LOSS, Forward, LossFn, accepted_arguments, is_label, logits_of
from .probing import Probe, probe

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
    """A few labelled rows to measure a loss on; see `probing.probe` for the fields."""

    together: Batch
    cut: Callable[[Batch], Sequence[Batch]] | None
    padded_apart: Sequence[Batch]


class Objective:
    """What is minimised: named mean losses, and how many items each is a mean over.

    Attributes:
        terms: the names of the means.
        count: a collated batch → its loss items, by term.
        counted_by: what the items are, in words.
        padding_sensitive: whether a window's rows must be padded to one width.
    """

    def __init__(
        self,
        forward: Forward,
        terms: Sequence[str],
        count: Callable[[Batch], Counts],
        *,
        counted_by: str,
        padding_sensitive: bool = False,
        sums: bool = False,
    ) -> None:
        self._forward = forward
        self.counted_by = counted_by
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
        """Settles how the loss is counted: by the user's `count_items`, else by measurement.

        A few forward passes in eval mode, without gradients; random-number states and buffers are put back. All
        processes take the main process's findings.

        Args:
            model: on its device, before it is wrapped.
            sums: whether the loss is handed over as a sum instead of a mean.

        Warns:
            InexactLossWarning: where no way to count explains the loss.
        """
        device = next(model.parameters()).device

        def losses(batch: Batch) -> dict[str, float]:
            means, _ = forward(model, send_to_device(batch, device))
            return {term: float(mean) for term, mean in means.items()}

        with only_looking(model):
            terms = tuple(losses(sample.together))
            if count_items is not None:
                by_user = lambda batch: counts_from_user(count_items(batch), terms)
                return cls(forward, terms, by_user, counted_by="count_items", sums=sums)
            if sums:
                name, way = counting.convention(sample.together)
                alike = lambda batch: {term: way(batch) for term in terms}
                return cls(forward, terms, alike, counted_by=f"{name} (the loss is a sum)", sums=True)
            half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
            found = probe(
                losses,
                sample.together,
                sample.cut,
                sample.padded_apart,
                counting=counting,
                half_precision=half,
            )
        (found,) = broadcast_object_list([found])
        _warn_of_unexplained(found)
        ways = {term: counting.ways[way] for term, way in found.ways.items()}
        count = lambda batch: {term: way(batch) for term, way in ways.items()}
        by = ", ".join(found.ways.values() if len(ways) == 1 else (f"{t}: {w}" for t, w in found.ways.items()))
        return cls(forward, terms, count, counted_by=f"{by} (measured)", padding_sensitive=found.padding_sensitive)

    def means(self, model: nn.Module, batch: Batch, counts: Counts, terms: Sequence[str]) -> tuple[Means, Any]:
        """The means of these terms over the batch's own items, and the model's outputs.

        Args:
            counts: the batch's items by term.
            terms: those that the batch has items of; the mean of any other would be NaN.
        """
        found, outputs = self._forward(model, batch)
        means = means_of_sums(found, counts) if self._sums else found
        return {term: means[term] for term in terms}, outputs


def _warn_of_unexplained(found: Probe) -> None:
    if found.unexplained:
        warnings.warn(
            f"The loss is not a mean over countable items: {'; '.join(found.unexplained)}. Accumulating it only "
            "approximates one large batch. Losses that compare the rows of a batch with each other do this; where "
            "yours is a mean over items of your own, give `count_items`.",
            InexactLossWarning,
            stacklevel=3,
        )
