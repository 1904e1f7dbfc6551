"""Predicts rows with a trained model."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device

from ..data.collator import RowCollator
from ..data.dataset import Rows
from ..objective.item_counts import IGNORE_INDEX
from ..planning.micro_batches import BatchLimits, MicroBatchPlanner, RowIndices
from ..runtime.memory import give_back_memory, is_out_of_memory
from ..runtime.state_guards import training_mode
from .base_run import Run
from .build_collator import build_padding, build_row_collator
from .build_evaluation import build_generator
from .build_rows import build_rows
from .config import RunConfig
from .evaluation_groups import EvaluationGroups
from .predictions import (
    BatchPredictions,
    check_form,
    copy_to_host,
    gather_on_main,
    ignored_outputs,
    join,
    named_outputs,
    unwrapped,
    without_numbers,
)

_ROWS_SORTED = 4096  # rows to sort by length together

# Takes the model, a batch on its device and the positions of its rows, and returns tensors with rows first.
Predict = Callable[[Any, Any, RowIndices], Any]


def predict_rows(config: RunConfig) -> Any:
    """Return the predictions of a model for its training rows, which need no labels.

    Returns:
        On the main process, arrays with the rows in their order, padded with -100 as for `compute_metrics`: the token
        ids of generated texts, if there are `generation_kwargs`; else the model's outputs, or the values that
        `preprocess_logits_for_metrics` makes of them. On the others, None.

    Raises:
        DataError: if the rows cannot be used.
    """
    with PredictionRun(config) as run:
        return run.predict(run.default_predict())


class PredictionRun(Run):
    """A run that predicts its rows and does not train its model."""

    def predict(self, predict: Predict) -> Any:
        """Return the predictions of all rows on the main process, and None on the others."""
        components = self.config.components
        rows = build_rows(self.config, self.accelerator, None).train
        collator = build_row_collator(components, build_padding(components, rows, None, IGNORE_INDEX, None)[0])
        kept: list[BatchPredictions] = []

        def predict_all() -> None:
            for positions in self._batches(rows):
                kept.extend(self._predicted(predict, rows, collator, positions))

        with torch.no_grad(), training_mode(self.model, training=False):
            self.process_group.run_on_all(predict_all)
        gathered = gather_on_main(kept, self.process_group)
        if not self.process_group.is_main:
            return None
        return join([each.predictions for each in gathered], [each.rows for each in gathered])

    def default_predict(self) -> Predict:
        """Return a function that generates texts, or one that returns outputs if there are no `generation_kwargs`."""
        generator = build_generator(self, IGNORE_INDEX)
        if generator is None:
            return lambda model, batch, _: self.outputs_of(model, batch)
        return lambda model, batch, rows: generator(model, batch, rows, lambda row: f"row {row} of the data")

    def outputs_of(self, model: Any, batch: Any) -> Any:
        """Return a model's outputs for a batch, or what `preprocess_logits_for_metrics` makes of them."""
        named = without_numbers(named_outputs(model(**batch), ignored_outputs(model), None))
        preprocess = self.config.components.preprocess_logits_for_metrics
        return unwrapped(named) if preprocess is None else preprocess(unwrapped(named), None)

    def _batches(self, rows: Rows) -> Iterator[RowIndices]:
        """Yield the batches of this process, each of rows of similar length."""
        runtime = self.config.runtime
        assert isinstance(runtime.batch_size, int), "checked with the options"
        assert not runtime.limits_tokens_automatically, "checked with the options"
        limits = BatchLimits(runtime.batch_size if runtime.token_limit is None else None, runtime.token_limit)
        planner = MicroBatchPlanner(limits, num_processes=self.process_group.size)
        for positions in EvaluationGroups(len(rows), _ROWS_SORTED):
            pieces = planner.split(positions, rows.lengths(positions))[self.accelerator.process_index]
            yield from (piece.rows for piece in pieces if piece.rows)

    def _predicted(
        self, predict: Predict, rows: Rows, collator: RowCollator, positions: RowIndices
    ) -> list[BatchPredictions]:
        """Return the predictions of one batch or, if memory runs out, of its two halves."""
        batch = send_to_device(collator(rows, positions), self.accelerator.device)
        try:
            with self.accelerator.autocast():
                predictions = predict(self.model, batch, positions)
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(positions) < 2:
                raise
        else:
            check_form(predictions, len(positions), "The outputs of the model")
            return [BatchPredictions(positions, recursively_apply(copy_to_host, predictions), None)]
        give_back_memory()
        middle = len(positions) // 2
        halves = positions[:middle], positions[middle:]
        return [each for half in halves for each in self._predicted(predict, rows, collator, half)]
