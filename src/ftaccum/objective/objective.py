"""The objective of training: mean losses of a model on micro-batches, and the number of loss items in each."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..runtime.module_attributes import ModuleAttributes
from .batch_changes import WatchedBatch
from .forward import Forward
from .item_counts import Batch, CountItems
from .labelled_head import LabelledHead, NeededLogits
from .normalizer import Counts, Means, means_of_sums
from .report import ExactnessReport
from .window_terms import Values, WindowTerms


class Objective:
    """The named mean losses that training minimizes, and how to count the loss items of each.

    Attributes:
        forward: the forward pass, whose loss this is.
        terms: the names of the means.
        count: maps a collated batch to its number of loss items, by term.
        report: how the counts were found, and how exact they are.
        window: the terms that read all rows of a window together; None if there are none.
    """

    def __init__(
        self,
        forward: Forward,
        count: Callable[[Batch], Counts],
        report: ExactnessReport,
        window: WindowTerms | None = None,
    ) -> None:
        self.forward, self.window = forward, window
        self.terms = tuple(report.ways)
        self.count = count
        self.report = report
        self.padding_sensitive = report.explanation.padding_sensitive
        self.shifts = report.shifts

    @property
    def is_over_window(self) -> bool:
        """Whether all terms read the window, so that a row has no loss of its own."""
        return self.window is not None and set(self.window.names) == set(self.terms)

    @property
    def count_by_term(self) -> dict[str, CountItems]:
        """The functions that count the loss items of a batch, one for each term."""

        def count_of(term: str) -> CountItems:
            return lambda batch: self.count(batch)[term]

        return {term: count_of(term) for term in self.terms}

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The modules that compute the loss, besides the model."""
        return self.forward.modules

    @property
    def state(self) -> Mapping[str, Any]:
        """The functions and modules whose state decides how the loss is computed, besides the model, by name."""
        return self.forward.state

    @property
    def labelled_head(self) -> LabelledHead | None:
        """The head that computes logits only at labelled positions; None if the model computes them all."""
        return self.forward.labelled_head

    def attributes_before_lazy_passes(self) -> ModuleAttributes | None:
        """Return the attributes of modules before passes with a lazy last layer; None if it is whole.

        If such a pass raises `LazyError`, restore them, and repeat the window with the whole layer.
        """
        last_layer = self.forward.last_layer
        return None if last_layer is None else last_layer.attributes(*self.modules)

    @contextmanager
    def lazy_last_layer(self) -> Iterator[None]:
        """Compute the last layer only at the positions that are read, until exit. A pass may raise `LazyError`."""
        before, self.forward.is_lazy = self.forward.is_lazy, True
        try:
            yield
        finally:
            self.forward.is_lazy = before

    def log_failed_lazy_pass(self, error: Exception) -> None:
        """Log that a window is repeated with the whole last layer."""
        if self.forward.last_layer is not None:
            self.forward.last_layer.log_failed_pass(error)

    @property
    def computes_fewer_positions(self) -> bool:
        """Whether passes of training compute fewer positions than the model itself, and so round differently."""
        return self.forward.labelled_head is not None or self.forward.last_layer is not None

    @property
    def loss_place(self) -> int | None:
        """The position of the model's own loss among its outputs in eval mode, if they have no names."""
        return self.forward.loss_place

    def means(
        self,
        model: nn.Module,
        batch: Batch,
        counts: Counts,
        terms: Sequence[str],
        rows: str = "these rows",
        needs: NeededLogits = NeededLogits.NONE,
    ) -> tuple[Means, Any]:
        """Return the means of these terms over the batch's own items, and the model's outputs.

        Args:
            batch: a copy (`fresh_batch`), because the forward pass may change it.
            counts: the batch's number of loss items, by term.
            terms: the terms with items in the batch; the mean of any other would be NaN.
            rows: the name of the rows in messages.
            needs: the logits that the caller reads from the outputs.

        Raises:
            DataError: if the loss has other terms, or other items, than were counted.
        """
        watched = WatchedBatch(batch)
        found, outputs = self.forward(model, batch, counts, needs)
        if any(counts.values()) and not self.report.counts_before_changes:
            refuse_other_counts(watched, self.count, counts, rows)
        self._check_terms(found, counts, terms, rows)
        means = means_of_sums(found, counts) if self.report.sums else found
        nothing = torch.zeros((), device=next(model.parameters()).device)
        return {term: means.get(term, nothing) for term in terms}, outputs

    def observe(
        self,
        model: nn.Module,
        batch: Batch,
        counts: Counts,
        terms: Sequence[str],
        rows: str = "these rows",
        needs: NeededLogits = NeededLogits.NONE,
    ) -> tuple[Means, Values, Any]:
        """Return the means of the terms that do not read the window, what the others read, and the model's outputs.

        The arguments are those of `means`.
        """
        if self.window is None:
            means, outputs = self.means(model, batch, counts, terms, rows, needs=needs)
            return means, {}, outputs
        if self.is_over_window:
            outputs = self.forward.outputs(model, batch)
            return {}, self.window.read(outputs, batch), outputs
        means, outputs = self.means(model, batch, counts, terms, rows, needs=needs)
        others = {term: mean for term, mean in means.items() if term not in self.window.names}
        return others, self.window.read(outputs, batch), outputs

    def loss_of_row(self, model: nn.Module, batch: Batch, counts: Counts, terms: Sequence[str]) -> float | None:
        """Return the loss of one row, run separately; None if it has no loss items.

        If all terms read the window, return a number that the loss reads of the row instead: one that is not finite, or
        0 if all of them are finite. The loss of a row alone says nothing then: a ranking of one row may be NaN.

        Args:
            batch: a copy (`fresh_batch`) of the batch with this row.
            counts: the batch's number of loss items, by term.
            terms: the terms with items in the batch.
        """
        if not self.is_over_window:
            means, _ = self.means(model, batch, counts, terms)
            return sum(mean.item() for mean in means.values()) if means else None
        _, values, _ = self.observe(model, batch, counts, terms)
        numbers = (value[~value.isfinite()] for value in values.values() if value.is_floating_point())
        return next((found[0].item() for found in numbers if len(found)), 0.0)

    def unweighted_loss(self, model: nn.Module, batch: Batch, counts: Counts, places: Sequence[int] = ()) -> Tensor:
        """Return the loss of one batch as the model or `loss_fn` returns it; divide a sum by the batch's items.

        Args:
            counts: the batch's number of loss items, by term.
            places: the positions of the rows in their window, for a loss over the window; empty if they are in order.
        """
        if not self.report.sums:
            return self.forward.unweighted_loss(model, batch, places)
        sums, _ = self.forward(model, batch)
        return torch.stack(list(means_of_sums(sums, counts).values())).sum()

    def _check_terms(self, found: Means, counts: Counts, terms: Sequence[str], rows: str) -> None:
        unknown = next((term for term in found if term not in self.terms), None)
        if unknown is not None:
            raise DataError(
                f"The loss of {rows} has a term {unknown!r}, which none of the rows checked before training had, so it "
                "is unknown which items it is a mean over. Give `count_items`: a function that returns a dict with the "
                f"number of items of every term, {[*self.terms, unknown]}, and 0 for a term without items."
            )
        absent = (term for term in terms if term not in found and counts[term])
        missing = next((term for term in absent if term not in self.report.absent_is_zero), None)
        if missing is not None:
            raise DataError(
                f"The loss of {rows} has no term {missing!r}, but it should be a mean over {counts[missing]:g} items "
                f"there (counted: {self.report.ways[missing]}). Return the term, or give a `count_items` that returns "
                "0 for it."
            )
        for term in (term for term in found if term not in terms and not counts[term]):
            refuse_mean_over_nothing(term, found[term].item(), rows)


def refuse_other_counts(watched: WatchedBatch, count: Callable[[Batch], Counts], counts: Counts, rows: str) -> None:
    """Raise DataError if a forward pass changed its batch and with it the number of loss items."""
    if not (changed := watched.changed()):
        return
    left = count(watched.as_seen())
    other = next((term for term in counts if not math.isclose(left[term], counts[term])), None)
    if other is not None:
        raise DataError(
            f"The forward pass of {rows} changes {', '.join(f'`{name}`' for name in changed)} of a batch in place. "
            f"Afterwards, the loss is a mean over {left[other]:g} items, but {counts[other]:g} were counted before the "
            "pass, so the gradient would be wrong. Make the change in the data or in `data_collator` instead, or give "
            "a `count_items` that counts only the items that are left after it."
        )


def refuse_mean_over_nothing(term: str, mean: float, rows: str) -> None:
    """Raise DataError if a term without items in a batch has a mean other than 0."""
    if math.isfinite(mean) and mean:
        raise DataError(
            f"The term {term!r} of the loss of {rows} is {mean:.3g}, but no items are counted for it there, so "
            "training would ignore it. Give a `count_items` that counts the items that it is a mean over."
        )
