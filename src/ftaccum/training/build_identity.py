"""The identity of a run, which checkpoints save so that only the same run resumes from them, and its `run.json`."""

import os
import platform
from importlib.metadata import version

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from ..checkpoint.compatibility import (
    RunIdentity,
    adapter_identity,
    function_identity,
    model_identity,
    optimizer_identity,
    package_versions,
    recipe_identity,
    rounding_settings,
    rows_identity,
    size_identity,
)
from ..data.iterable import is_stream
from ..planning.batch_size import BatchSizes
from ..planning.halves import MeasuredWindows
from ..runtime.adapters import has_adapters
from ..runtime.device_state import device_name
from ..tasks.loaded_models import options_of
from ..tracking.run_record import RunRecord, size_entries
from .build_data import TrainingData
from .config import RunConfig
from .named_sources import describe_subject
from .rates import peak_rates, summarize_optimizer


def build_identity(
    config: RunConfig,
    data: TrainingData,
    optimizer: Optimizer,
    batch_sizes: BatchSizes,
    accelerator: Accelerator,
    *,
    evaluation_rows: int,
    plans: bool,
    is_sharded: bool,
) -> RunIdentity:
    """Return the identity of a run.

    Args:
        evaluation_rows: the rows of a group of validation rows.
        plans: whether the planner chooses where to cut windows.
        is_sharded: whether the model is sharded, which a config file of the launcher may ask for.
    """
    components, sizes = config.components, batch_sizes
    return RunIdentity(
        recipe=recipe_identity(config.recipe),
        trained_on={
            "effective_batch_size": size_identity(sizes),
            "evaluation_rows": evaluation_rows,
            "train_data": rows_identity(data.train_rows),
            "val_data": rows_identity(data.val_rows),
            "model": model_identity(components.model),
            "lora": adapter_identity(components.model),
            "optimizer": optimizer_identity(optimizer),
            "learning_rate": peak_rates(optimizer),
            "loss_fn": function_identity(components.loss_fn),
            "loss_inputs": function_identity(components.loss_inputs),
            "data_collator": function_identity(components.data_collator),
        },
        run_with={
            "processes": sizes.num_processes,
            "batch_size": sizes.batch_size,
            "mixed_precision": accelerator.mixed_precision,
            "device": accelerator.device.type,
            **rounding_settings(config.runtime),
            "sharding": "fsdp2" if is_sharded else None,
            "sync": config.runtime.sync if is_sharded else None,
            "planner": plans,
        },
        n_rows=len(data.train_rows),
        versions=package_versions(),
    )


def software_versions(model: nn.Module) -> dict[str, str]:
    """Return the versions of Python and of the packages that a run uses, by name."""
    packages = ["datasets", *(["peft"] if has_adapters(model) else [])]
    return package_versions() | {name: version(name) for name in packages} | {"python": platform.python_version()}


def build_record(
    config: RunConfig,
    data: TrainingData,
    batch_sizes: BatchSizes,
    accelerator: Accelerator,
    measured: MeasuredWindows,
    optimizer: Optimizer,
) -> RunRecord:
    """Return the record of a run that starts now."""
    model, command = config.components.model, config.command
    n_rows = None if is_stream(config.components.train_data) else len(data.train_rows)
    return RunRecord(
        recipe=recipe_identity(config.recipe),
        tokens_per_update=config.recipe.tokens_per_update,
        amp_enabled=accelerator.mixed_precision != "no",
        keep_checkpoints=config.runtime.keep_checkpoints,
        sources={} if command is None else command.sources,
        environment={
            **software_versions(model),
            "system": platform.platform(),
            "device": device_name(accelerator.device),
            "mixed precision": accelerator.mixed_precision,
        },
        noise_scale_reason=measured.reason,
        subject=describe_subject(config, n_rows, is_synthetic=data.synthetic),
        directory="" if command is None else os.getcwd(),
        optimizer=summarize_optimizer(optimizer).describe_kind(),
        text_columns=list(data.text_columns) or None,
        loaded_with=dict(options_of(model)),
        **size_entries(batch_sizes),
    )
