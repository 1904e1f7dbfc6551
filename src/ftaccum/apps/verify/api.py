"""`verify`: what users call."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ...arguments import find_faults, read_settings
from ...data.collator import Collator
from ...data.convert import as_rows
from ...errors import SettingsError, refuse
from ...objective.forward import LossFn
from ...objective.item_counts import CountItems
from ...training.config import RunConfig
from .report import Verification
from .run import VerificationRun
from .settings import VerifySettings


def verify(
    model: nn.Module,
    data: Any = None,
    *,
    config: Any = None,
    text_columns: str | Sequence[str] | None = None,
    add_eos_token: bool = True,
    batch_size: int = 4,
    gradient_accumulation_steps: int = 1,
    effective_batch_size: int | None = None,
    tokens_per_update: int | None = None,
    max_tokens: int | None = None,
    planner: bool = True,
    planner_costs: Sequence[float] | None = None,
    padding_free: bool = False,
    use_amp: bool = False,
    mixed_precision: str | None = None,
    gradient_checkpointing: bool = False,
    tokenizer: Any = None,
    data_collator: Collator | None = None,
    loss_fn: LossFn | None = None,
    reduction: str = "mean",
    count_items: CountItems | None = None,
    random_seed: int = 42,
    deterministic: bool = False,
    n_splits: int = 3,
    dtype: str | None = None,
    tolerance: float | None = None,
    progress: bool = True,
) -> Verification:
    """Compare accumulating with one large batch, on this model and these rows, by the gradients themselves.

    The reference is one batch of all rows of an update: collated anew, one plain call of the model, its own loss (or
    `loss_fn`), one backward pass. Nothing that ftaccum measures or infers is in it, so it can disagree. Then the same
    rows are accumulated by the code that trains, cut as in training, row by row, in random orders and sizes, and short
    as an epoch's last window is. Rows with rare label values or columns take up to a quarter of the update. The model
    is in train mode, without dropout, which differs with the cut. Model, gradients, generators and the state of the
    process are left as they were.

    Args:
        data: rows, as `train_data` of `test_fine_tuning`. None: synthetic token ids below `config.vocab_size`.
        n_splits: cuts into random orders and sizes.
        dtype: "float64", "float32" or "model", as it is. None: float64, in which rounding hides nothing; where the
            model or memory does not allow it, float32; under autocast, as it is.
        tolerance: relative error up to which a gradient is exact. None: 4 times what rounding alone makes of one
            batch, its rows in another order and its loss times a third; within bounds that the precision sets.
        progress: show a progress bar.

    The other arguments are those of `test_fine_tuning`, and mean the same.

    Returns:
        The table and its verdict, on all processes the same; see `Verification`.

    Raises:
        SettingsError: arguments that cannot be used, all in one message, before anything is loaded.
        DataError: data that cannot be trained on.
        torch.OutOfMemoryError: where a row or a micro-batch does not fit in memory. (Where the rows of an update do not
            fit together, fewer of them are measured, and a note says so.)

    Example:
        >>> print(verify(model, rows, batch_size=4, gradient_accumulation_steps=8))
    """
    arguments = {
        "train_data": None if data is None else as_rows(data, "data"),
        "model": model,
        "config": config,
        "text_columns": text_columns,
        "add_eos_token": add_eos_token,
        "batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "effective_batch_size": effective_batch_size,
        "tokens_per_update": tokens_per_update,
        "max_tokens": max_tokens,
        "planner": planner,
        "planner_costs": planner_costs,
        "padding_free": padding_free,
        "use_amp": use_amp,
        "mixed_precision": mixed_precision,
        "gradient_checkpointing": gradient_checkpointing,
        "tokenizer": tokenizer,
        "data_collator": data_collator,
        "loss_fn": loss_fn,
        "reduction": reduction,
        "count_items": count_items,
        "random_seed": random_seed,
        "deterministic": deterministic,
        "n_splits": n_splits,
        "dtype": dtype,
        "tolerance": tolerance,
        "progress": progress,
    }
    settings, config = _read(arguments)
    with VerificationRun(config, settings) as run:
        return run.verify()


def _read(arguments: Mapping[str, Any]) -> tuple[VerifySettings, RunConfig]:
    """Check the arguments, and complete them to those of a run in which all rows train."""
    settings = read_settings(VerifySettings, arguments)
    faults = find_faults(settings)
    arguments = {
        **arguments,
        **dict.fromkeys(("val_data", "optimizer", "compute_metrics")),
        "validation_split": 0.0,
        "on_inexact": "ignore",  # the verdict names what is inexact
    }
    if settings.dtype == "float64":
        if arguments["use_amp"] or arguments["mixed_precision"] not in (None, "no"):
            faults.append("`dtype` is 'float64', which autocast leaves alone. Drop it, or give dtype='model'.")
        else:
            arguments["mixed_precision"] = "no"  # whatever `accelerate launch` was told
    if arguments["batch_size"] == "auto":
        faults.append("`batch_size` must be a number here: how a window is cut is what is verified. Give one.")
        arguments["batch_size"] = 1  # what else 'auto' would want is of no use here
    try:
        config = RunConfig.from_arguments(arguments)
    except SettingsError as error:
        raise SettingsError([*faults, *error.faults]) from error
    refuse(faults)
    return settings, config
