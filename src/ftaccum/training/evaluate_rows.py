"""Evaluates a trained model on rows."""

from dataclasses import dataclass

from ..runtime.log import logger
from .base_run import Run
from .build_evaluation import build_evaluation
from .config import RunConfig
from .evaluation_groups import EvaluationGroups

# Rows of a group on which a loss that reads several rows is computed, if the model's run does not tell. It is fixed so
# that the loss does not depend on `batch_size`.
_ROWS_TOGETHER = 64


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
    with Run(config) as run:
        groups = EvaluationGroups(len(run.data.train_rows), config.recipe.effective_batch_size or _ROWS_TOGETHER)
        if run.data.objective.window is not None:
            logger.info(f"{groups.describe()}.")
        return Evaluated(groups.n_rows, *build_evaluation(run, run.data.train, groups)(run.model))
