"""Validation: the loss over every validation row, and metrics on the model's predictions."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..data.loader import Loader, LocalRows, MicroBatch
from ..objective.batch_changes import fresh_batch
from ..objective.labelled_head import NeededLogits
from ..objective.normalizer import Means, WeightedMeans, gathered
from ..objective.objective import Objective
from ..objective.window_terms import CollectedValues, WindowTerms
from ..planning.micro_batches import MicroBatchPlanner, RowIndices
from ..runtime.memory import give_back_memory, is_out_of_memory
from ..runtime.process_group import ProcessGroup
from ..runtime.state_guards import training_mode
from .evaluation_groups import EvaluationGroups
from .generator import Generator
from .metrics import GENERATED, Metrics
from .prediction_memory import check_prediction_memory, vocabulary_sizes
from .predictions import BatchPredictions

# Numbers of rows to collate together if padding affects the loss or the collator draws random numbers, and to sort by
# length together if not. The first is fixed so that the results do not depend on the batch sizes of the run.
_ROWS_TOGETHER, _ROWS_SORTED = 64, 4096


@dataclass
class _Totals:
    """The losses and predictions of this process so far.

    Attributes:
        losses: the mean losses of all rows so far.
        predicted: the predictions of all rows so far.
        passes: the values of the current group for the terms that read several rows together.
        n_rows: the number of rows of this process in the current group.
    """

    losses: WeightedMeans
    predicted: list[BatchPredictions] = field(default_factory=list)
    passes: list[CollectedValues] = field(default_factory=list)
    n_rows: int = 0


class Evaluation:
    """Evaluates a model on the validation rows, each exactly once, on all processes together."""

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        loader: Loader,
        groups: EvaluationGroups,
        planner: MicroBatchPlanner,
        process_group: ProcessGroup,
        metrics: Metrics | None,
        generator: Generator | None = None,
    ) -> None:
        """Args:
        groups: the groups of rows that the loss reads together, if it reads several rows.
        """
        self._accelerator, self._objective, self._loader = accelerator, objective, loader
        self._groups, self._planner, self._process_group = groups, planner, process_group
        self._metrics, self._generator = metrics, generator

    def check_memory(self, model: nn.Module, config: Any) -> None:
        """Raise SettingsError if `compute_metrics` would get the logits of every token of a language model.

        Run the longest validation row to see the outputs.

        Args:
            config: the model's configuration, or another object that may have a `vocab_size`.
        """
        metrics = self._metrics
        if metrics is None or self._generator is not None or not metrics.keeps_outputs:
            return
        with torch.no_grad(), training_mode(model, training=False):
            micro = self._loader.longest_rows(1)
            batch = fresh_batch(micro.batch, self._accelerator.device)
            *_, outputs = self._objective.observe(
                model, batch, micro.counts, micro.terms, micro.names, NeededLogits.ALL
            )
        named = metrics.named_outputs(outputs)
        check_prediction_memory(
            named, vocabulary_sizes(model, config), self._groups.n_rows, predicts_next_token=self._objective.shifts
        )

    def __call__(
        self, model: nn.Module, independent_passes: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> tuple[float, dict[str, float]]:
        """Return the loss, a mean over all loss items, and the metrics by name.

        Terms of the loss that read several rows together are computed on groups of rows. Their mean is weighted by the
        rows of the groups.

        Args:
            model: the model without DDP, which would communicate in its forward pass: processes may have different
                numbers of batches.
            independent_passes: returns a context in which processes may run different numbers of batches of a sharded
                model.

        Raises:
            DataError: on all processes, if a row of one of them cannot be read or used.
            MetricsError: on all processes of several, if `compute_metrics` or `preprocess_logits_for_metrics` fails.
            SettingsError: if what one of these returns cannot be used.
        """
        accelerator, metrics, window = self._accelerator, self._metrics, self._objective.window
        totals = _Totals(WeightedMeans(self._objective.terms, accelerator.device))

        def evaluate(micro_batches: Callable[[], Iterable[MicroBatch]]) -> None:
            with independent_passes():
                for micro in micro_batches():
                    self._evaluate(model, micro, totals)

        both = nn.ModuleList([model, *self._objective.modules])  # a loss may have dropout, or state, too
        with torch.no_grad(), training_mode(both, training=False):
            if window is None:
                stream = self._loader.stream(self._local_rows(self._rows_together()))
                self._process_group.run_on_all(lambda: evaluate(lambda: stream))
            else:
                shares = self._loader.stream_shares(self._local_rows(self._groups))
                for group in self._groups:
                    self._process_group.run_on_all(lambda: evaluate(lambda: next(shares)))
                    self._compute(window, group, totals)
        (losses,) = gathered([totals.losses], accelerator)
        return losses.total(), {} if metrics is None else metrics.compute(totals.predicted)

    def _compute(self, window: WindowTerms, group: RowIndices, totals: _Totals) -> None:
        """Add the terms of a group after its last batch."""
        passes, n_rows = totals.passes, totals.n_rows
        totals.passes, totals.n_rows = [], 0
        # A loss that draws random numbers draws the same in each evaluation.
        computed = window.compute(passes, self._process_group, (group[0],))
        totals.losses.add(computed.means, {term: n_rows * (term in window.names) for term in self._objective.terms})

    def _evaluate(self, model: nn.Module, micro: MicroBatch, totals: _Totals) -> None:
        """Evaluate one batch or, if memory runs out, its two halves."""
        try:
            means, first, kept = self._forward(model, micro)
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(micro.slice.rows) < 2:
                raise
        else:
            together = () if self._objective.window is None else self._objective.window.names
            totals.losses.add(means, {term: 0 if term in together else n for term, n in micro.counts.items()})
            totals.n_rows += len(micro.slice.rows)
            totals.passes += [first] if together else []
            totals.predicted += kept
            return
        give_back_memory()
        for half in self._loader.halves(micro):
            self._evaluate(model, half, totals)

    def _forward(self, model: nn.Module, micro: MicroBatch) -> tuple[Means, CollectedValues, list[BatchPredictions]]:
        """Return the losses of one batch, what terms over several rows read of it, and its predictions for the metrics.

        The outputs live no longer than this call, so that the device never holds those of two batches.
        """
        metrics, batch = self._metrics, fresh_batch(micro.batch, self._accelerator.device)
        labels = None if metrics is None else metrics.labels_of(batch)
        needs = NeededLogits.NONE if metrics is None or self._generator is not None else metrics.needs
        means, values, outputs = self._objective.observe(model, batch, micro.counts, micro.terms, micro.names, needs)
        first = CollectedValues.of(micro.slice.places, values)
        if self._generator is not None:
            del outputs  # their memory is needed
            batch, rows = fresh_batch(micro.batch, self._accelerator.device), micro.slice.rows
            outputs = {GENERATED: self._generator(model, batch, rows, self._loader.name_of)}
        kept = [] if metrics is None else [metrics.keep(micro, outputs, labels)]
        return {term: mean.detach() for term, mean in means.items()}, first, kept

    def _rows_together(self) -> EvaluationGroups:
        """Return the groups of rows to load together if the loss does not read them together."""
        return EvaluationGroups(self._groups.n_rows, _ROWS_TOGETHER if self._loader.by_window else _ROWS_SORTED)

    def _local_rows(self, groups: EvaluationGroups) -> Iterator[LocalRows]:
        for rows in groups:
            slices = self._loader.cut(rows, self._planner)[self._accelerator.process_index]
            # No process waits for another one in its passes, so no dummy micro-batches are needed.
            yield LocalRows(rows, [piece for piece in slices if piece.rows], (rows[0],))
