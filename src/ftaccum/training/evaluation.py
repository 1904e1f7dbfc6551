"""Validation: the loss over every validation row, and metrics on the model's predictions."""

import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from evaluate import CombinedEvaluations, EvaluationModule
from torch import Tensor, nn
from transformers import EvalPrediction

from ..data.loader import Loader, LocalRows, MicroBatch
from ..errors import MetricsError, SettingsError
from ..objective.batch_changes import fresh_batch
from ..objective.forward import logits_of
from ..objective.item_counts import IGNORE_INDEX, targets_of
from ..objective.normalizer import WeightedMeans, gathered
from ..objective.objective import Objective
from ..planning.micro_batches import MicroBatchPlanner, RowIndices
from ..runtime.memory import give_back_memory, is_out_of_memory
from ..runtime.process_group import ProcessGroup
from ..runtime.state_guards import training_mode

_Predicted: TypeAlias = tuple[RowIndices, np.ndarray, np.ndarray]  # rows, predictions, labels
ComputeMetrics: TypeAlias = Callable[[EvalPrediction], Mapping[str, float]] | EvaluationModule | CombinedEvaluations

_MODULES = (EvaluationModule, CombinedEvaluations)
# Numbers of rows to collate together if padding affects the loss or the collator draws random numbers, and to sort by
# length together if not. The first is fixed so that the results do not depend on the batch sizes of the run.
_ROWS_TOGETHER, _ROWS_SORTED = 64, 4096


def fault_of_metrics(compute_metrics: Any) -> str | None:
    """Return a message that says why `compute_metrics` cannot be used, or None if it can."""
    if compute_metrics is None or callable(compute_metrics) or isinstance(compute_metrics, _MODULES):
        return None
    return (
        "`compute_metrics` must be a function of an EvalPrediction or an `evaluate` module, but is "
        f"{compute_metrics!r} instead. For example, give `compute_metrics=ftaccum.Accuracy()`."
    )


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
        compute_metrics: ComputeMetrics | None,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        self._accelerator, self._objective, self._loader = accelerator, objective, loader
        self._n_rows, self._planner, self._process_group = n_rows, planner, process_group
        self._metrics = None if compute_metrics is None else _Metrics(compute_metrics, ignore_index, objective.shifts)

    def __call__(self, model: nn.Module) -> tuple[float, dict[str, float]]:
        """Return the loss, a mean over all loss items, and the metrics by name.

        Args:
            model: the unwrapped model. A wrapped one might communicate in its forward pass, but processes may have
                different numbers of batches.

        Raises:
            DataError: on all processes, if a row of one of them cannot be read or used.
            MetricsError: on all processes of several, if `compute_metrics` fails on the main one.
        """
        accelerator, metrics = self._accelerator, self._metrics
        losses = WeightedMeans(self._objective.terms, accelerator.device)
        predicted: list[_Predicted] = []

        def evaluate_all() -> None:
            for micro in self._loader.stream(self._local_rows()):
                self._evaluate(model, micro, losses, predicted)

        with torch.no_grad(), training_mode(model, training=False):
            self._process_group.run_on_all(evaluate_all)
        (losses,) = gathered([losses], accelerator)
        return losses.total(), {} if metrics is None else self._computed(metrics, predicted)

    def _evaluate(
        self, model: nn.Module, micro: MicroBatch, losses: WeightedMeans, predicted: list[_Predicted]
    ) -> None:
        """Evaluate one batch or, if memory runs out, its two halves."""
        try:
            batch = fresh_batch(micro.batch, self._accelerator.device)
            means, outputs = self._objective.means(model, batch, micro.counts, micro.terms, micro.names)
            kept = [] if self._metrics is None else [self._metrics.keep(micro.slice.rows, outputs, batch)]
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

    def _local_rows(self) -> Iterator[LocalRows]:
        together = _ROWS_TOGETHER if self._loader.by_window else _ROWS_SORTED
        for start in range(0, self._n_rows, together):
            rows = tuple(range(start, min(start + together, self._n_rows)))
            slices = self._loader.cut(rows, self._planner)[self._accelerator.process_index]
            # No process waits for another one here, so no dummy micro-batches are needed.
            yield LocalRows(rows, [piece for piece in slices if piece.rows], (start,))

    def _computed(self, metrics: "_Metrics", predicted: list[_Predicted]) -> dict[str, float]:
        if self._process_group.is_single:
            return metrics.compute(predicted)
        everyone = gather_object(predicted)

        def compute() -> dict[str, float]:
            try:
                return metrics.compute(everyone)
            except SettingsError:
                raise
            except Exception as error:  # other processes may be unable to unpickle its class
                raise MetricsError(f"`compute_metrics` failed on the main process: {error!r}") from error

        return self._process_group.run_on_main(compute)


class _Metrics:
    """Collects predictions batch by batch, and calls the user's `compute_metrics` on all of them."""

    def __init__(self, compute: ComputeMetrics, ignore_index: int, shifts: bool) -> None:
        """Args:
        shifts: whether the logits at one position predict the label at the next.
        """
        self._compute, self._ignore_index, self._shifts = compute, ignore_index, shifts
        modules = getattr(compute, "evaluation_modules", [compute])
        features = [module.features for module in modules if isinstance(module, EvaluationModule)]
        self._takes_classes = "int" in str(features[:1])

    def keep(self, rows: RowIndices, outputs: Any, batch: Any) -> _Predicted:
        """Return the predictions and labels of a batch on the host, as `compute_metrics` needs them.

        For a function, these are the logits and labels; for an `evaluate` module, the predictions (usually classes) and
        labels at positions that are not ignored.
        """
        logits, labels = logits_of(outputs), targets_of(batch)
        assert labels is not None, "checked before training"
        if not isinstance(self._compute, _MODULES):
            return rows, _on_host(logits), _on_host(labels)
        if not labels.is_floating_point():
            classes = logits if logits.shape == labels.shape else logits.argmax(-1)
        elif self._takes_classes:  # multi-label classification
            classes, labels = (logits > 0).long().reshape(labels.shape), labels.long()
        else:
            classes = logits.reshape(labels.shape)
        if self._shifts:
            classes, labels = classes[:, :-1], labels[:, 1:]
        counted = labels != self._ignore_index
        return rows, _on_host(classes[counted]), _on_host(labels[counted])

    def compute(self, predicted: list[_Predicted]) -> dict[str, float]:
        """Return the metrics over all batches, by name. A user's function gets the rows in their original order."""
        rows, predictions, labels = zip(*predicted, strict=True)
        if isinstance(self._compute, _MODULES):
            found = self._compute.compute(predictions=np.concatenate(predictions), references=np.concatenate(labels))
        else:
            order = np.argsort(np.concatenate(rows))
            found = self._compute(EvalPrediction(_joined(predictions)[order], _joined(labels)[order]))
        if not isinstance(found, Mapping):
            raise SettingsError(
                [f"`compute_metrics` must return a dict of numbers by name, but returned {found!r} instead."]
            )
        strays = {name: value for name, value in found.items() if not isinstance(value, numbers.Real)}
        if strays:
            raise SettingsError([f"`compute_metrics` must return numbers, but returned {strays} instead."])
        return {name: float(value) for name, value in found.items()}


def _on_host(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()


def _joined(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    """Concatenate arrays along the rows; pad unequal widths with -100, as Transformers' `Trainer` does."""
    shape = tuple(map(max, zip(*(a.shape for a in arrays), strict=True)))[1:]
    widened = [
        np.pad(
            a,
            [(0, 0), *((0, m - n) for n, m in zip(a.shape[1:], shape, strict=True))],
            constant_values=IGNORE_INDEX,
        )
        for a in arrays
    ]
    return np.concatenate(widened)
