"""The public function `verify`."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ...arguments import find_faults, read_settings
from ...data.collator import Collator
from ...data.convert import as_rows
from ...errors import SettingsError, refuse
from ...objective.item_counts import CountItems
from ...objective.model_forward import LossFn
from ...objective.window_loss import LossInputs
from ...porting.keywords import explain_keywords
from ...training.config import RunConfig
from ..run_arguments import default_arguments
from .report import Verification
from .run import VerificationRun
from .settings import VerifySettings


@explain_keywords(others=default_arguments(), renamed={"train_data": "data"})
def verify(
    model: nn.Module,
    data: Any = None,
    *,
    config: Any = None,
    text_columns: str | Sequence[str] | None = None,
    add_eos_token: bool = True,
    max_length: int | None = None,
    batch_size: int = 4,
    gradient_accumulation_steps: int = 1,
    effective_batch_size: int | None = None,
    tokens_per_update: int | None = None,
    max_tokens: int | str | None = None,
    planner: bool = True,
    planner_costs: Sequence[float] | None = None,
    padding_free: bool = False,
    loss_head: str = "auto",
    use_amp: bool = False,
    mixed_precision: str | None = None,
    gradient_checkpointing: bool = False,
    tokenizer: Any = None,
    data_collator: Collator | None = None,
    loss_fn: LossFn | None = None,
    class_weights: str | Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    loss_over: str = "items",
    loss_inputs: LossInputs | None = None,
    router_balance: str = "window",
    reduction: str = "mean",
    count_items: CountItems | None = None,
    random_seed: int = 42,
    deterministic: bool = False,
    lora: Any = None,
    n_splits: int = 3,
    dtype: str | None = None,
    tolerance: float | None = None,
    progress: bool = True,
    verbosity: str = "normal",
) -> Verification:
    """Compare the gradients of accumulation with those of one large batch, on a model and its rows.

    The reference is one batch of all rows of an update: collated again, passed to the model in one plain call, with the
    model's own loss (or `loss_fn`) and one backward pass. It uses nothing that ftaccum measures or infers, so it can
    disagree with training. Then the code that trains accumulates the same rows: split as in training, one row at a
    time, in random orders and sizes, and in short windows like the last of an epoch. Rows with rare label values or
    columns replace up to a quarter of the rows of the update. The model runs in train mode without dropout, because
    dropout would differ between splits. The model, without the adapters of `lora`, gradients, random generators and the
    state of the process are restored.

    Args:
        data: rows, as `train_data` of `test_fine_tuning`. None: synthetic token ids below `config.vocab_size`.
        n_splits: number of additional splits into random orders and sizes.
        dtype: type of the weights in the measurement: "float64", "float32", or "model" for no change. None: float64,
            in which rounding hides no errors; float32 if the model or the memory does not allow float64; no change
            under autocast.
        tolerance: the largest relative error that counts as exact. None: 4 times the error that rounding causes, within
            bounds that depend on the precision. This error is the difference between one batch and the same batch with
            its rows reversed and its loss multiplied by a third.
        progress: whether to show a progress bar in a terminal or a notebook.
        verbosity: "quiet" shows only warnings, and no progress bar; "debug" also logs how the loss was measured.

    The other arguments are those of `test_fine_tuning`, and mean the same.

    Returns:
        The table and its verdict, the same on all processes; see `Verification`.

    Raises:
        SettingsError: if arguments cannot be used, with all faults in one message, before anything is measured.
        DataError: if the data cannot be trained on.
        torch.OutOfMemoryError: if a row or a micro-batch does not fit in memory. If the rows of an update do not fit
            together, fewer of them are measured, and a note reports it.

    Example:
        >>> print(verify(model, rows, batch_size=4, gradient_accumulation_steps=8))
    """
    arguments = {
        "train_data": None if data is None else as_rows(data, "data"),
        "model": model,
        "config": config,
        "text_columns": text_columns,
        "add_eos_token": add_eos_token,
        "max_length": max_length,
        "batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "effective_batch_size": effective_batch_size,
        "tokens_per_update": tokens_per_update,
        "max_tokens": max_tokens,
        "planner": planner,
        "planner_costs": planner_costs,
        "padding_free": padding_free,
        "loss_head": loss_head,
        "use_amp": use_amp,
        "mixed_precision": mixed_precision,
        "gradient_checkpointing": gradient_checkpointing,
        "tokenizer": tokenizer,
        "data_collator": data_collator,
        "loss_fn": loss_fn,
        "class_weights": class_weights,
        "label_smoothing": label_smoothing,
        "loss_over": loss_over,
        "loss_inputs": loss_inputs,
        "router_balance": router_balance,
        "reduction": reduction,
        "count_items": count_items,
        "random_seed": random_seed,
        "deterministic": deterministic,
        "lora": lora,
        "n_splits": n_splits,
        "dtype": dtype,
        "tolerance": tolerance,
        "progress": progress,
        "verbosity": verbosity,
    }
    settings, config = _read(arguments)
    with VerificationRun(config, settings) as run:
        return run.verify()


def _read(arguments: Mapping[str, Any]) -> tuple[VerifySettings, RunConfig]:
    """Check the arguments, and add those of a run that trains on all rows."""
    settings = read_settings(VerifySettings, arguments)
    faults = find_faults(settings)
    arguments = {
        **arguments,
        **dict.fromkeys(("val_data", "optimizer", "compute_metrics")),
        "validation_split": 0.0,
        "on_inexact": "ignore",  # the verdict reports it
        "self_check_cache": False,  # measure everything
    }
    if settings.dtype == "float64":
        if arguments["use_amp"] or arguments["mixed_precision"] not in (None, "no"):
            faults.append(
                "`dtype` is 'float64', which autocast does not cast. Turn autocast off (`use_amp`, `mixed_precision`), "
                "or give dtype='model'."
            )
        else:
            arguments["mixed_precision"] = "no"  # overrides the setting of `accelerate launch`
    if arguments["batch_size"] == "auto":
        faults.append("`batch_size` must be a number in `verify`, but is 'auto' instead. Give the one to verify.")
        arguments["batch_size"] = 1  # other faults of 'auto' do not matter here
    try:
        config = RunConfig.from_arguments(arguments)
    except SettingsError as error:
        raise SettingsError([*faults, *error.faults]) from error
    refuse(faults)
    return settings, config
