"""Evaluates a trained model on rows."""

from dataclasses import dataclass
from functools import cached_property

from torch.optim import SGD

from ..runtime.gradients.plain import GradientStrategy
from .base_run import Run
from .build_evaluation import build_evaluation
from .config import RunConfig


@dataclass(frozen=True)
class Evaluated:
    """The loss and the metrics of a model on rows.

    Attributes:
        n_rows: the number of rows.
        loss: the mean over all loss items.
        metrics: the metrics by name.
    """

    n_rows: int
    loss: float
    metrics: dict[str, float]


def evaluate_rows(config: RunConfig) -> Evaluated:
    """Evaluate the model of a configuration on its training rows, each once, on all processes together.

    Raises:
        DataError: if the rows cannot be used.
        SettingsError: if the metrics cannot be computed.
    """
    with EvaluationRun(config) as run:
        rows = len(run.data.train_rows)
        return Evaluated(rows, *build_evaluation(run, run.data.train, rows)(run.model))


class EvaluationRun(Run):
    """A run that evaluates its model and does not train it."""

    @cached_property
    def gradients(self) -> GradientStrategy:
        return GradientStrategy(SGD(self.model.parameters()))  # it never steps
