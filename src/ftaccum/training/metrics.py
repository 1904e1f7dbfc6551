"""Metrics on the predictions of all validation rows, computed by the user's function or an `evaluate` module."""

import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from accelerate.utils import recursively_apply
from evaluate import CombinedEvaluations, EvaluationModule
from torch import Tensor, nn
from transformers import EvalPrediction

from ..data.loader import MicroBatch
from ..errors import MetricsError, SettingsError, fault_of_class, shown
from ..objective.item_counts import Batch, are_per_token, targets_of
from ..objective.labelled_head import NeededLogits
from ..objective.labelled_positions import LabelledPositions
from ..objective.objective import Objective
from ..objective.own_loss import logits_of
from ..runtime.memory import is_out_of_memory
from ..runtime.process_group import ProcessGroup
from .predictions import (
    BatchPredictions,
    check_form,
    concatenate,
    copy_to_host,
    gather_on_main,
    ignored_outputs,
    join,
    label_columns,
    labels_of,
    named_outputs,
    unwrapped,
    without_numbers,
)

ComputeMetrics: TypeAlias = Callable[[EvalPrediction], Mapping[str, float]] | EvaluationModule | CombinedEvaluations
PreprocessLogits: TypeAlias = Callable[[Any, Any], Any]

GENERATED = "sequences"  # the output of generated token ids, as `model.generate` names it

_MODULES = (EvaluationModule, CombinedEvaluations)


def faults_of_metrics(compute_metrics: Any, preprocess_logits: Any) -> list[str]:
    """Return a sentence for each reason why `compute_metrics` and `preprocess_logits_for_metrics` cannot be used."""
    faults = []
    if not (compute_metrics is None or callable(compute_metrics) or isinstance(compute_metrics, _MODULES)):
        faults.append(
            "`compute_metrics` must be a function of an EvalPrediction or an `evaluate` module, but is "
            f"{shown(compute_metrics)} instead. For example, give `compute_metrics=ftaccum.Accuracy()`; "
            "`evaluate.combine` joins several modules."
        )
    elif fault := fault_of_class("compute_metrics", compute_metrics):
        faults.append(fault)
    elif is_function(compute_metrics) and not _takes_one_argument(compute_metrics):
        name = getattr(compute_metrics, "__name__", "function")
        faults.append(
            f"`compute_metrics` is called with one argument, an EvalPrediction, but {name} takes others. Give a "
            f"function of it, such as `lambda p: {{'{name}': {name}(p.label_ids, p.predictions.argmax(-1))}}`."
        )
    if preprocess_logits is None:
        return faults
    name = "`preprocess_logits_for_metrics`"
    if not callable(preprocess_logits):
        faults.append(
            f"{name} must be a function of logits and labels, or None, but is {shown(preprocess_logits)} instead. For "
            "example, give `lambda logits, labels: logits.argmax(-1)`."
        )
    if compute_metrics is None:
        faults.append(
            f"{name} is given, but `compute_metrics` is None, so nothing uses what it returns. Give a function as "
            "`compute_metrics`, or leave both out."
        )
    elif isinstance(compute_metrics, _MODULES):
        faults.append(
            f"{name} is given, but `compute_metrics` is an `evaluate` module, which gets classes that ftaccum takes "
            "from the logits. Give a function as `compute_metrics`, or leave out `preprocess_logits_for_metrics`."
        )
    return faults


def _takes_one_argument(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None)
    except ValueError:  # a builtin function may have no signature
        return True
    except TypeError:
        return False
    return True


def is_function(compute_metrics: Any) -> bool:
    """Return whether `compute_metrics` gets an EvalPrediction."""
    return callable(compute_metrics) and not isinstance(compute_metrics, _MODULES)


def has_labels(compute_metrics: ComputeMetrics, model: nn.Module, batch: Batch) -> bool:
    """Return whether a batch has the labels that `compute_metrics` needs."""
    columns = () if isinstance(compute_metrics, _MODULES) else label_columns(model)
    return labels_of(batch, columns) is not None


class Metrics:
    """Collects predictions batch by batch, and calls the user's `compute_metrics` on all of them.

    Attributes:
        keeps_outputs: whether the model's outputs are kept as they are.
    """

    def __init__(
        self,
        compute: ComputeMetrics,
        preprocess: PreprocessLogits | None,
        model: nn.Module,
        objective: Objective,
        ignore_index: int,
        process_group: ProcessGroup,
    ) -> None:
        self._compute, self._preprocess = compute, preprocess
        self._ignore_index, self._process_group = ignore_index, process_group
        self._is_module = isinstance(compute, _MODULES)
        self._columns, self._ignored = label_columns(model), ignored_outputs(model)
        self._shifts, self._loss_place = objective.shifts, objective.loss_place
        modules = getattr(compute, "evaluation_modules", [compute])
        features = [module.features for module in modules if isinstance(module, EvaluationModule)]
        self._takes_classes = "int" in str(features[:1])
        self.keeps_outputs = preprocess is None and not self._is_module
        self._positions = LabelledPositions(objective.shifts, ignore_index)
        self._by_position = bool(getattr(preprocess, "by_position", False))
        self._gets_labelled = objective.labelled_head is not None and (self._is_module or self._by_position)
        if self._gets_labelled:
            self._loss_place = None  # the outputs have no loss

    @property
    def needs(self) -> NeededLogits:
        """The logits that the metrics read."""
        return NeededLogits.LABELLED if self._gets_labelled else NeededLogits.ALL

    def labels_of(self, batch: Batch) -> Any:
        """Return the labels of a batch. Call this before the forward pass, which may change the batch."""
        return targets_of(batch) if self._is_module else labels_of(batch, self._columns)

    def named_outputs(self, outputs: Any) -> dict[str, Any]:
        """Return the model's outputs without its loss, by name."""
        return named_outputs(outputs, self._ignored, self._loss_place)

    def keep(self, micro: MicroBatch, outputs: Any, labels: Any) -> BatchPredictions:
        """Return the predictions and labels of a batch on the host, as `compute_metrics` needs them.

        For a function, these are what `preprocess_logits_for_metrics` returns, or the outputs, and the labels. For an
        `evaluate` module, they are the predictions (usually classes) and labels at positions that are not ignored.
        """
        assert labels is not None, "checked before training"
        if self._is_module:
            predictions, labels = self._counted(logits_of(outputs), labels)
        else:
            predictions = self._predictions(self.named_outputs(outputs), labels, micro)
            check_form(labels, len(micro.slice.rows), "The labels for `compute_metrics`")
        kept, kept_labels = (recursively_apply(copy_to_host, each) for each in (predictions, labels))
        return BatchPredictions(micro.slice.rows, kept, kept_labels)

    def compute(self, batches: Sequence[BatchPredictions]) -> dict[str, float]:
        """Return the metrics over all batches of all processes, by name, on every process.

        The main process computes them. A user's function gets the rows in their original order.

        Raises:
            MetricsError: on all processes of several, if `compute_metrics` fails on the main one.
        """
        gathered = gather_on_main(batches, self._process_group)
        if self._process_group.is_single:
            return self._computed(gathered)

        def compute() -> dict[str, float]:
            try:
                return self._computed(gathered)
            except SettingsError:
                raise
            except Exception as error:  # other processes may be unable to unpickle its class
                raise MetricsError(f"`compute_metrics` failed on the main process: {error!r}") from error

        return self._process_group.run_on_main(compute)

    def _counted(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predictions and labels at positions that are not ignored."""
        if self._gets_labelled:
            return logits[0].argmax(-1), self._positions.targets(labels, self._positions.places(labels))
        if not labels.is_floating_point():
            classes = logits if logits.shape == labels.shape else logits.argmax(-1)
        elif self._takes_classes:  # multi-label classification
            classes, labels = (logits > 0).long().reshape(labels.shape), labels.long()
        else:
            classes = logits.reshape(labels.shape)
        if self._shifts:
            classes, labels = classes[:, :-1], labels[:, 1:]
        counted = labels != self._ignore_index
        return classes[counted], labels[counted]

    def _predictions(self, named: Mapping[str, Any], labels: Any, micro: MicroBatch) -> Any:
        """Return the predictions for a function: the outputs, or what `preprocess_logits_for_metrics` makes of them."""
        n_rows = len(micro.slice.rows)
        if self._preprocess is None:
            predictions = unwrapped(without_numbers(named))
            check_form(predictions, n_rows, "The outputs of the model for `compute_metrics`")
            return predictions
        if self._by_position and are_per_token(labels):
            predictions = self._predictions_by_position(logits_of(named), labels, micro)
        else:
            predictions = self._preprocessed(unwrapped(named), labels, micro)
        check_form(predictions, n_rows, "The result of `preprocess_logits_for_metrics`")
        return predictions

    def _predictions_by_position(self, logits: Tensor, labels: Tensor, micro: MicroBatch) -> Tensor:
        """Return the predictions at labelled positions, in the places of their logits."""
        places = self._positions.places(labels)
        if not self._gets_labelled:
            logits = logits.flatten(0, 1)[places][None]
        targets = self._positions.targets(labels, places)[None]
        predictions = self._preprocessed(logits, targets, micro)
        if not isinstance(predictions, Tensor) or predictions.shape != targets.shape:
            kind = f"a tensor of shape {tuple(predictions.shape)}" if isinstance(predictions, Tensor) else "no tensor"
            raise SettingsError(
                [
                    "`preprocess_logits_for_metrics` has `by_position = True`, so it must return a number for each "
                    f"labelled position, a tensor of shape {tuple(targets.shape)}, but returned {kind}. Return, for "
                    "example, `logits.argmax(-1)`, or remove `by_position`."
                ]
            )
        return self._positions.scatter(predictions, labels)

    def _preprocessed(self, logits: Any, labels: Any, micro: MicroBatch) -> Any:
        """Return the result of `preprocess_logits_for_metrics`."""
        assert self._preprocess is not None, "checked by the caller"
        try:
            return self._preprocess(logits, labels)
        except Exception as error:
            if self._process_group.is_single or is_out_of_memory(error):
                raise
            raise MetricsError(f"`preprocess_logits_for_metrics` failed on {micro.names}: {error!r}") from error

    def _computed(self, batches: Sequence[BatchPredictions]) -> dict[str, float]:
        predictions, labels = [each.predictions for each in batches], [each.labels for each in batches]
        if isinstance(self._compute, _MODULES):
            found = self._compute.compute(predictions=concatenate(predictions), references=concatenate(labels))
        else:
            rows = [each.rows for each in batches]
            found = self._compute(EvalPrediction(join(predictions, rows), join(labels, rows)))
        if not isinstance(found, Mapping):
            raise SettingsError(
                [f"`compute_metrics` must return a dict of numbers by name, but returned {found!r} instead."]
            )
        strays = {name: value for name, value in found.items() if not isinstance(value, numbers.Real)}
        if strays:
            raise SettingsError([f"`compute_metrics` must return numbers, but returned {strays} instead."])
        return {name: float(value) for name, value in found.items()}
