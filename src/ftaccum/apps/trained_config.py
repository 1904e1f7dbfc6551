"""The configuration of a run that evaluates or predicts the rows of a trained model."""

from collections.abc import Mapping
from typing import Any

from ..tasks.trained import Trained
from ..training.config import RunConfig
from .run_arguments import default_arguments


def trained_config(trained: Trained, evaluation: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a run whose training rows are the rows to evaluate.

    Args:
        evaluation: arguments of `test_fine_tuning` that evaluate or predict rows.
    """
    task, model, processor = trained.task, trained.model, trained.processor
    more = task.training_arguments(processor, model) | dict(evaluation)
    given = {"model": model, "train_data": trained.encoded, "tokenizer": processor, **more, **trained.settings}
    # Without validation rows, a run refuses metrics, so the rows are those for validation as well.
    return RunConfig.from_arguments(default_arguments() | given | {"val_data": trained.encoded, "on_inexact": "ignore"})
