"""Tasks that give each row one class, several classes or a number."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, mean_squared_error
from transformers import EvalPrediction

from ..metrics import ClassificationMetrics
from ..runtime.log import logger
from .arguments import NamedArguments
from .labels import MULTI, REGRESSION, SINGLE, Labels
from .task import EncodingOptions, Task

_MULTI_METRICS = ("f1_micro", "f1_macro", "exact_match")
_REGRESSION_METRICS = ("mse", "mae", "pearson", "spearman")
_METRICS: Mapping[str, tuple[str, ...]] = {
    SINGLE: ClassificationMetrics.NAMES,
    MULTI: _MULTI_METRICS,
    REGRESSION: _REGRESSION_METRICS,
}


class Classification(Task):
    """A class, several classes or a number for each row. Subclasses define the inputs."""

    labels: Labels

    def __init__(self, named: NamedArguments) -> None:
        super().__init__(named)
        kinds = _METRICS if named.problem_type is None else (named.problem_type,)
        self.metrics = tuple(metric for kind in kinds for metric in _METRICS[kind])

    def head(self, train: Dataset) -> dict[str, Any]:
        self.labels = Labels.read(train, "train_data", self.named.problem_type)
        self.metrics = _METRICS[self.labels.problem_type]
        _warn_of_first_class(self.labels, train["label"])
        return self.labels.head()

    def read_config(self, config: Any) -> None:
        self.labels = Labels.of_config(config)
        self.metrics = _METRICS[self.labels.problem_type]

    def encode(self, rows: Dataset, argument: str, processor: Any, model: Any, options: EncodingOptions) -> Dataset:  # noqa: ARG002
        return self.labels.encode(rows, argument) if "label" in rows.column_names else rows

    def evaluation_arguments(self, processor: Any, model: Any) -> dict[str, Any]:  # noqa: ARG002
        functions: dict[str, Any] = {MULTI: multi_label_metrics, REGRESSION: regression_metrics}
        return {"compute_metrics": functions.get(self.labels.problem_type) or ClassificationMetrics()}

    def predicted_columns(self, predictions: Any, rows: Dataset, processor: Any, model: Any) -> dict[str, list[Any]]:  # noqa: ARG002
        logits = np.asarray(predictions, dtype=np.float64)
        config = model.config
        if self.labels.problem_type == REGRESSION:
            return {"prediction": (logits if logits.ndim > 1 and logits.shape[1] > 1 else logits.reshape(-1)).tolist()}
        if self.labels.problem_type == MULTI:
            scores = 1 / (1 + np.exp(-logits))
            named = [[config.id2label[n] for n in np.flatnonzero(row > 0.5)] for row in scores]
            return {"prediction": named, "scores": scores.tolist()}
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        best = shares.argmax(-1)
        return {"prediction": [config.id2label[int(n)] for n in best], "score": shares.max(-1).tolist()}


def _warn_of_first_class(labels: Labels, values: Iterable[Any]) -> None:
    """Warn if the classes are whole numbers that begin above 0, as the model then has classes without rows."""
    if not labels.values or type(labels.values[0]) is not int:
        return
    least = min(chain.from_iterable(value if isinstance(value, list) else [value] for value in values))
    if least > 0:
        logger.warning(f"No row has class 0. Do the labels start at {least:g}?")


def multi_label_metrics(evaluated: EvalPrediction) -> dict[str, float]:
    """Return F1 over all decisions (micro) and averaged over classes (macro), and the share of rows with all right.

    A class is predicted if its logit is above 0, which is a probability above one half.
    """
    predicted, wanted = np.asarray(evaluated.predictions) > 0, np.asarray(evaluated.label_ids) > 0.5
    f1 = {f"f1_{how}": float(f1_score(wanted, predicted, average=how, zero_division=0.0)) for how in ("micro", "macro")}
    return f1 | {"exact_match": float(accuracy_score(wanted, predicted))}


def regression_metrics(evaluated: EvalPrediction) -> dict[str, float]:
    """Return the mean squared and absolute error, and the correlations of numbers and of their ranks.

    A correlation is NaN if all predictions, or all labels, are equal.
    """
    predicted = np.asarray(evaluated.predictions, dtype=np.float64).reshape(-1)
    wanted = np.asarray(evaluated.label_ids, dtype=np.float64).reshape(-1)
    errors = {
        "mse": float(mean_squared_error(wanted, predicted)),
        "mae": float(mean_absolute_error(wanted, predicted)),
    }
    return errors | {
        "pearson": _correlation(pearsonr, wanted, predicted),
        "spearman": _correlation(spearmanr, wanted, predicted),
    }


def _correlation(measure: Callable[..., Any], wanted: np.ndarray, predicted: np.ndarray) -> float:
    if np.ptp(wanted) == 0 or np.ptp(predicted) == 0:
        return float("nan")
    return float(measure(wanted, predicted).statistic)
