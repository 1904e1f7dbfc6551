"""Mean losses of a model on micro-batches, and the loss items that they are means over."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .forward import Forward
from .item_counts import Batch
from .normalizer import Counts, Means, means_of_sums
from .report import ExactnessReport


class Objective:
    """What is minimised: named mean losses, and how many items each is a mean over.

    Attributes:
        terms: the names of the means.
        count: a collated batch → its loss items, by term.
        findings: how that was measured, and how exact it is.
    """

    def __init__(self, forward: Forward, count: Callable[[Batch], Counts], report: ExactnessReport) -> None:
        self._forward = forward
        self.terms = tuple(report.ways)
        self.count = count
        self.report = report
        self.padding_sensitive = report.explanation.padding_sensitive
        self.shifts = report.shifts

    def means(self, model: nn.Module, batch: Batch, counts: Counts, terms: Sequence[str]) -> tuple[Means, Any]:
        """The means of these terms over the batch's own items, and the model's outputs.

        Args:
            counts: the batch's items by term.
            terms: those that the batch has items of; the mean of any other would be NaN.
        """
        found, outputs = self._forward(model, batch)
        means = means_of_sums(found, counts) if self.report.sums else found
        return {term: means[term] for term in terms}, outputs

    def unweighted_loss(self, model: nn.Module, batch: Batch, counts: Counts) -> Tensor:
        """Return the loss of one batch as the model or `loss_fn` gives it; a sum is divided by the batch's items.

        Args:
            counts: the batch's items by term.
        """
        if not self.report.sums:
            return self._forward.unweighted_loss(model, batch)
        sums, _ = self._forward(model, batch)
        return torch.stack(list(means_of_sums(sums, counts).values())).sum()
