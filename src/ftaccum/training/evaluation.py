"""Validation: the loss over every validation row, and metrics on the model's predictions."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..data.loader import Loader, LocalRows, MicroBatch
from ..objective.batch_changes import fresh_batch
from ..objective.normalizer import Means, WeightedMeans, gathered
from ..objective.objective import Objective
from ..planning.micro_batches import MicroBatchPlanner
from ..runtime.memory import give_back_memory, is_out_of_memory
from ..runtime.process_group import ProcessGroup
from ..runtime.state_guards import training_mode
from .generator import Generator
from .metrics import GENERATED, Metrics
from .prediction_memory import check_prediction_memory, vocabulary_sizes
from .predictions import BatchPredictions

# Numbers of rows to collate together if padding affects the loss or the collator draws random numbers, and to sort by
# length together if not. The first is fixed so that the results do not depend on the batch sizes of the run.
_ROWS_TOGETHER, _ROWS_SORTED = 64, 4096


class Evaluation:
    """Evaluates a model on the validation rows, each exactly once, on all processes together."""

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        loader: Loader,
        n_rows: int,
        planner: MicroBatchPlanner,
        process_group: ProcessGroup,
        metrics: Metrics | None,
        generator: Generator | None = None,
    ) -> None:
        self._accelerator, self._objective, self._loader = accelerator, objective, loader
        self._n_rows, self._planner, self._process_group = n_rows, planner, process_group
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
            outputs = self._objective.means(model, batch, micro.counts, micro.terms, micro.names)[1]
        named = metrics.named_outputs(outputs)
        check_prediction_memory(
            named, vocabulary_sizes(model, config), self._n_rows, predicts_next_token=self._objective.shifts
        )

    def __call__(
        self, model: nn.Module, independent_passes: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> tuple[float, dict[str, float]]:
        """Return the loss, a mean over all loss items, and the metrics by name.

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
        accelerator, metrics = self._accelerator, self._metrics
        losses = WeightedMeans(self._objective.terms, accelerator.device)
        predicted: list[BatchPredictions] = []

        def evaluate_all() -> None:
            with independent_passes():
                for micro in self._loader.stream(self._local_rows()):
                    self._evaluate(model, micro, losses, predicted)

        with torch.no_grad(), training_mode(model, training=False):
            self._process_group.run_on_all(evaluate_all)
        (losses,) = gathered([losses], accelerator)
        return losses.total(), {} if metrics is None else metrics.compute(predicted)

    def _evaluate(
        self, model: nn.Module, micro: MicroBatch, losses: WeightedMeans, predicted: list[BatchPredictions]
    ) -> None:
        """Evaluate one batch or, if memory runs out, its two halves."""
        try:
            means, kept = self._forward(model, micro)
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(micro.slice.rows) < 2:
                raise
        else:
            losses.add(means, micro.counts)
            predicted += kept
            return
        give_back_memory()
        for half in self._loader.halves(micro):
            self._evaluate(model, half, losses, predicted)

    def _forward(self, model: nn.Module, micro: MicroBatch) -> tuple[Means, list[BatchPredictions]]:
        """Return the losses of one batch, and its predictions if there are metrics.

        The outputs live no longer than this call, so that the device never holds those of two batches.
        """
        metrics, batch = self._metrics, fresh_batch(micro.batch, self._accelerator.device)
        labels = None if metrics is None else metrics.labels_of(batch)
        means, outputs = self._objective.means(model, batch, micro.counts, micro.terms, micro.names)
        if self._generator is not None:
            del outputs  # their memory is needed
            batch, rows = fresh_batch(micro.batch, self._accelerator.device), micro.slice.rows
            outputs = {GENERATED: self._generator(model, batch, rows, self._loader.name_of)}
        kept = [] if metrics is None else [metrics.keep(micro, outputs, labels)]
        return {term: mean.detach() for term, mean in means.items()}, kept

    def _local_rows(self) -> Iterator[LocalRows]:
        together = _ROWS_TOGETHER if self._loader.by_window else _ROWS_SORTED
        for start in range(0, self._n_rows, together):
            rows = tuple(range(start, min(start + together, self._n_rows)))
            slices = self._loader.cut(rows, self._planner)[self._accelerator.process_index]
            # No process waits for another one here, so no dummy micro-batches are needed.
            yield LocalRows(rows, [piece for piece in slices if piece.rows], (start,))
