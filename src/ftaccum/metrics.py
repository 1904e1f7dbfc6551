"""Metrics that work without access to the Hugging Face Hub, for example `compute_metrics=ftaccum.Accuracy()`.

They subclass `evaluate.Metric`, so `compute`, `add_batch` and `evaluate.combine` work as for any other metric. Like the
Hub's metrics of the same names, they compute with scikit-learn.
"""

from collections.abc import Mapping
from typing import Any

import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error, precision_score, recall_score


class _Metric(evaluate.Metric):
    _dtype = "int64"
    _description = ""

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value(self._dtype)
        return evaluate.MetricInfo(
            description=self._description,
            citation="",
            inputs_description="predictions and references, one number each",
            features=datasets.Features({"predictions": value, "references": value}),
        )


class Accuracy(_Metric):
    """Share of predictions that equal their references."""

    _description = "Share of predictions that equal their references."

    def _compute(self, predictions: Any, references: Any) -> Mapping[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(_Metric):
    """F1, precision and recall, averaged over classes."""

    _description = "Harmonic mean of precision and recall, averaged over classes."

    def __init__(self, average: str = "macro", **kwargs: Any) -> None:
        """Create the metric.

        Args:
            average: how to average, as in scikit-learn: "macro", "micro", "weighted" or "binary".
            **kwargs: arguments of `evaluate.Metric`.
        """
        super().__init__(**kwargs)
        self._average = average

    def _compute(self, predictions: Any, references: Any) -> Mapping[str, float]:
        how = {"average": self._average, "zero_division": 0.0}
        scores = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
        return {name: float(score(references, predictions, **how)) for name, score in scores.items()}


class ClassificationMetrics(F1):
    """Accuracy, F1, precision and recall."""

    NAMES = ("accuracy", "f1", "precision", "recall")
    _description = "Accuracy, and F1, precision and recall averaged over classes."

    def _compute(self, predictions: Any, references: Any) -> Mapping[str, float]:
        accuracy = {"accuracy": float(accuracy_score(references, predictions))}
        return accuracy | dict(super()._compute(predictions, references))


class MeanSquaredError(_Metric):
    """Mean squared difference between predictions and references, for regression."""

    _dtype = "float64"
    _description = "Mean squared difference between predictions and references."

    def _compute(self, predictions: Any, references: Any) -> Mapping[str, float]:
        return {"mse": float(mean_squared_error(references, predictions))}
