"""The definition of the best evaluation of a run, and of how long it has not improved."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import SettingsError
from .ledger import EvaluationEntry

LOSS = "val_loss"
# Words in the names of metrics, as in `eval_f1_macro`, that tell which values are better.
_GREATER = {
    *("accuracy", "acc", "f1", "precision", "recall", "auc", "auroc", "roc", "ap", "map", "mrr", "ndcg", "bleu"),
    *("sacrebleu", "rouge", "rouge1", "rouge2", "rougel", "rougelsum", "meteor", "chrf", "bertscore", "em", "exact"),
    *("match", "matthews", "mcc", "pearson", "pearsonr", "spearman", "spearmanr", "kappa", "r2", "iou", "dice"),
}
_LOWER = {"loss", "perplexity", "ppl", "mse", "rmse", "mae", "error", "wer", "cer", "ter", "brier", "eer"}
_REVERSED = {"neg", "negative", "minus", "inverse", "inverted", "drop", "decrease", "gap", "1"}


def infer_greater_is_better(metric: str) -> bool | None:
    """Return whether greater values of a metric are better, judged by the words of its name; None if unknown."""
    words = set(metric.lower().replace("-", "_").split("_"))
    is_greater, is_lower = bool(words & _GREATER), bool(words & _LOWER)
    return None if is_greater == is_lower or words & _REVERSED else is_greater


@dataclass(frozen=True)
class Criterion:
    """The criterion by which evaluations are compared. Only finite values count: NaN and infinity are never the best.

    Attributes:
        metric: the name of a metric, or `LOSS` for the validation loss.
        greater_is_better: whether greater values are better.
        min_delta: the smallest improvement that resets the patience of early stopping.
    """

    metric: str = LOSS
    greater_is_better: bool = False
    min_delta: float = 0.0

    @classmethod
    def of_settings(cls, metric: str | None, greater_is_better: bool | None, min_delta: float = 0.0) -> "Criterion":
        """Return the criterion for the settings `metric_for_best`, `greater_is_better`, `early_stopping_min_delta`."""
        metric = _name_of(metric)
        inferred = infer_greater_is_better(metric) if greater_is_better is None else greater_is_better
        return cls(metric, bool(inferred), min_delta)

    @property
    def name(self) -> str:
        """The metric's name in messages."""
        return "validation loss" if self.metric == LOSS else self.metric

    def value(self, entry: EvaluationEntry) -> float:
        """Return the value of an evaluation; NaN if it does not have the metric."""
        return entry.val_loss if self.metric == LOSS else _by_name(entry).get(self.metric, math.nan)

    def is_known(self, entry: EvaluationEntry) -> bool:
        """Return whether an evaluation has the metric, even if its value is NaN."""
        return self.metric == LOSS or self.metric in _by_name(entry)

    def best(self, evaluations: Iterable[EvaluationEntry]) -> EvaluationEntry | None:
        """Return the best evaluation after the first update, the earlier of two equal ones; None if there is none."""
        finite = [entry for entry in evaluations if entry.evaluation and math.isfinite(self.value(entry))]
        return min(finite, key=lambda entry: self._cost(self.value(entry)), default=None)

    def n_without_improvement(self, evaluations: Sequence[EvaluationEntry]) -> int:
        """Return the number of evaluations since the last one that improved by more than `min_delta`."""
        lowest, count = math.inf, 0
        for entry in evaluations:
            if not entry.evaluation:
                continue
            value = self.value(entry)
            if math.isfinite(value) and self._cost(value) < lowest - (self.min_delta if lowest < math.inf else 0):
                lowest, count = self._cost(value), 0
            else:
                count += 1
        return count

    def check(self, metrics: Iterable[str]) -> None:
        """Check that evaluations have the metric.

        Args:
            metrics: the names of the metrics that they have.

        Raises:
            SettingsError: if not. The message lists the names.
        """
        names = [LOSS, *metrics]
        if self.metric not in (name.removeprefix("eval_") for name in names):
            raise SettingsError(
                [
                    f"`metric_for_best` is {self.metric!r}, but `compute_metrics` returns no metric of this name. "
                    f"Choose one of: {', '.join(names)}."
                ]
            )

    def _cost(self, value: float) -> float:
        return -value if self.greater_is_better else value


def _name_of(metric: str | None) -> str:
    """Return the name of a metric without the prefix that `Trainer` gives it."""
    name = (metric or LOSS).removeprefix("eval_")
    return LOSS if name == "loss" else name


def _by_name(entry: EvaluationEntry) -> dict[str, float]:
    return {name.removeprefix("eval_"): value for name, value in entry.metrics.items()}


def fault_of_criterion(metric: str | None, greater_is_better: bool | None, has_metrics: bool) -> str | None:
    """Return a message that says why `metric_for_best` cannot be used, or None if it can."""
    metric = _name_of(metric)
    if metric == LOSS:
        if greater_is_better:
            return (
                "`greater_is_better` is True, but `metric_for_best` is the validation loss, which is better if lower. "
                "Name a metric in `metric_for_best`, or omit `greater_is_better`."
            )
        return None
    if not has_metrics:
        return (
            f"`metric_for_best` is {metric!r}, but `compute_metrics` is None, so only the validation loss is known. "
            "Give `compute_metrics`, or omit `metric_for_best`."
        )
    if greater_is_better is None and infer_greater_is_better(str(metric)) is None:
        return (
            f"`metric_for_best` is {metric!r}, and its name does not tell whether greater values are better. Check its "
            "spelling, and set `greater_is_better` to True or False."
        )
    return None
