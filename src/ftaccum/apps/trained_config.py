"""The configuration of a run that evaluates or predicts the rows of a trained model."""

from ..tasks.trained import Trained
from ..training.config import RunConfig
from .run_arguments import default_arguments


def trained_config(trained: Trained) -> RunConfig:
    """Return the configuration of a run whose training rows are the rows to evaluate."""
    task, model, processor = trained.task, trained.model, trained.processor
    more = task.training_arguments(processor, model) | task.evaluation_arguments(processor, model)
    given = {"model": model, "train_data": trained.encoded, "tokenizer": processor, **more, **trained.settings}
    # Without validation rows, a run refuses metrics, so the rows are those for validation as well.
    return RunConfig.from_arguments(default_arguments() | given | {"val_data": trained.encoded, "on_inexact": "ignore"})
