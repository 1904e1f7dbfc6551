"""What a checkpoint says about its run, to be resumed by the same one."""

from importlib.metadata import version

from torch.optim import Optimizer

from .. import __version__
from ..checkpoint.compatibility import (
    RunIdentity,
    function_identity,
    model_identity,
    optimizer_identity,
    recipe_identity,
    rounding_settings,
    rows_identity,
    size_identity,
)
from ..planning.batch_size import BatchSizes
from .build_data import TrainingData
from .config import RunConfig


def identify(
    config: RunConfig, data: TrainingData, optimizer: Optimizer, batch_sizes: BatchSizes, *, plans: bool, precision: str
) -> RunIdentity:
    """Return the identity of a run that is about to train.

    Args:
        plans: whether the planner cuts its windows.
        precision: the resolved mixed precision.
    """
    components = config.components
    return RunIdentity(
        recipe=recipe_identity(config.recipe),
        trained_on={
            "effective_batch_size": size_identity(batch_sizes),
            "train_data": rows_identity(data.train_rows),
            "val_data": rows_identity(data.val_rows),
            "model": model_identity(components.model),
            "optimizer": optimizer_identity(optimizer),
            "loss_fn": function_identity(components.loss_fn),
            "data_collator": function_identity(components.data_collator),
        },
        run_with={
            "processes": batch_sizes.num_processes,
            "batch_size": batch_sizes.batch_size,
            "mixed_precision": precision,
            "device": next(components.model.parameters()).device.type,
            **rounding_settings(config.runtime),
            "planner": plans,
        },
        n_rows=len(data.train_rows),
        versions={"ftaccum": __version__, **{name: version(name) for name in ("torch", "transformers", "accelerate")}},
    )
