"""Mean losses of a model on micro-batches, and the loss items that they are means over."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .counting import Batch
from .denominator import Counts, Means, means_of_sums
from .forward import Forward


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

    def means(self, model: nn.Module, batch: Batch, counts: Counts, terms: Sequence[str]) -> tuple[Means, Any]:
        """The means of these terms over the batch's own items, and the model's outputs.

        Args:
            counts: the batch's items by term.
            terms: those that the batch has items of; the mean of any other would be NaN.
        """
        found, outputs = self._forward(model, batch)
        means = means_of_sums(found, counts) if self._sums else found
        return {term: means[term] for term in terms}, outputs
