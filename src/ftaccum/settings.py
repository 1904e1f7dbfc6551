"""Recipe and Runtime: the one declaration of each setting.

A run is decided by its Recipe. The Runtime may change time and memory, never the result.
"""

from dataclasses import dataclass
from functools import partial

from .fields import (
    Audit,
    BatchSize,
    Costs,
    Count,
    Every,
    Flag,
    Fraction,
    Names,
    NonNegative,
    OnInexact,
    OnNonfinite,
    Positive,
    PositiveInt,
    Precision,
    Remainder,
    Resume,
    Scaling,
    Seed,
    Steps,
    Text,
    TextNames,
    Tracker,
    names_where,
    setting,
)

_training = partial(setting, group="length of training")
_size = partial(setting, group="size of an update")
_asked_size = partial(_size, sizes_update=True, in_plan=True, in_verify=True, decided_by_search=True)
_optimization = partial(setting, group="optimization")
_evaluation = partial(setting, group="evaluation")
_speed = partial(setting, group="speed and memory")
_cut = partial(_speed, matters_to_rounding=True, in_verify=True)
_precision = partial(setting, group="precision")
_check = partial(setting, group="checks")
_repeat = partial(setting, group="reproducibility")
_output = partial(setting, group="checkpoints and output")
_logging = partial(setting, group="logging")

# Why `search` cannot vary an argument.
SAME_ROWS = "every trial has the same rows in the same order and the same budget of them"
OWN_ARGUMENT = "it is an argument of the search itself"
_FROM_STEPS = "`accumulation_steps` says which batches are tried"
_FIXED_BATCH = "the physical batch of a search is fixed"

_data = partial(setting, group="model and data", in_verify=True, unsearchable=SAME_ROWS)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is learned. Two runs with the same Recipe reach the same weights, up to rounding.

    Three settings size an update: k, rows, tokens. With the physical batch and the number of processes they give one
    effective batch size, once, at the start. A resumed run has the same Recipe, except for what `allow_changed` names.
    """

    text_columns: TextNames | None = _data(
        None,
        "column of the texts, or two for pairs, as in premise,hypothesis; None takes the only one",
        "--text_column",
    )
    add_eos_token: Flag = _data(True, "end each text of a causal LM in the tokenizer's end-of-text token")
    n_epochs: PositiveInt = _training(3, "passes over the training rows", in_plan=True, unsearchable=SAME_ROWS)
    max_updates: PositiveInt | None = _training(
        None,
        "updates after which training ends, if the epochs have not ended it before; None: the epochs alone",
        in_plan=True,
        decided_by_search=True,
        unsearchable=SAME_ROWS,
    )
    gradient_accumulation_steps: Steps = _asked_size(
        1,
        "micro-batches per update on each process (k); 0:2,100:8 for 2 at first and 8 from update 100 on; 1 leaves it "
        "to the two below, if one is given",
        unsearchable=OWN_ARGUMENT,
    )
    effective_batch_size: PositiveInt | None = _asked_size(
        None, "rows per update over all processes; sets k", unsearchable=_FROM_STEPS
    )
    tokens_per_update: PositiveInt | None = _asked_size(
        None, "tokens per update over all processes; sets k", unsearchable=_FROM_STEPS
    )
    remainder: Remainder = _size(
        "flush",
        "rows left at the end of an epoch: flush makes a short update of them, carry completes it from the next epoch",
        in_plan=True,
        unsearchable=SAME_ROWS,
    )
    learning_rate: Positive = _optimization(
        5e-5, "peak learning rate", decided_by_search=True, unsearchable=OWN_ARGUMENT
    )
    learning_rate_scaling: Scaling = _optimization(
        "none",
        "how the rate follows a k that changes: none, sqrt (adaptive optimizers) or linear (SGD)",
        in_plan=True,
        decided_by_search=True,
        unsearchable=_FROM_STEPS,
    )
    weight_decay: NonNegative = _optimization(0.01, "decoupled weight decay; biases and norms get none")
    lr_scheduler: Text = _optimization("linear", "name of a schedule that transformers' get_scheduler knows")
    warmup_steps: Count = _optimization(0, "updates of warm-up")
    warmup_ratio: Fraction = _optimization(0.0, "share of all updates that is warm-up, instead of a number of them")
    gradient_clip_norm: Positive | None = _optimization(1.0, "largest total gradient norm; None clips nothing")
    validation_split: Fraction = _evaluation(
        0.1,
        "share of the training rows held out if there is no validation data; 0 holds out none",
        in_plan=True,
        unsearchable=SAME_ROWS,
    )
    early_stopping_patience: PositiveInt | None = _evaluation(
        None,
        "epochs without a better validation loss after which training stops; None never stops",
        decided_by_search=True,
        unsearchable="it would give trials unlike budgets; a pruner ends the bad ones",
    )
    restore_best_weights: Flag = _evaluation(False, "end with the weights of the epoch of best validation loss")
    random_seed: Seed = _repeat(
        42,
        "seed of the hold-out, the order of the rows and dropout",
        in_plan=True,
        in_verify=True,
        decided_by_search=True,
        unsearchable=SAME_ROWS,
    )


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How it is run: time and memory, not the result. A resumed run may have any other Runtime."""

    batch_size: BatchSize = _size(
        4,
        "rows of a micro-batch on one process (the physical batch); auto takes the most that fit in memory",
        in_verify=True,
        unsearchable=_FIXED_BATCH,
    )
    max_tokens: PositiveInt | None = _cut(
        None,
        "most positions of a micro-batch, padding included; sizes micro-batches by these instead of by rows",
        unsearchable=_FIXED_BATCH,
    )
    planner: Flag = _cut(True, "cut each window where it costs least; without, equal slices in order of arrival")
    planner_costs: Costs | None = _cut(
        None,
        "cost of a pass: fixed, per padded token, per row of squared width; None takes 64, 1 and 0.0005",
    )
    padding_free: Flag = _cut(
        False, "put the rows of a micro-batch one behind the other instead of padding them (causal LMs)"
    )
    gradient_checkpointing: Flag = _cut(False, "recompute activations instead of keeping them")
    compile: Flag = _speed(
        False, "torch.compile the model; widths are padded to buckets, to bound their number", matters_to_rounding=True
    )
    num_workers: Count = _speed(0, "processes that collate ahead, for rows that take long to make; 0 for none")
    use_amp: Flag = _precision(
        False, "autocast: bf16 where the device supports it, else fp16 with a scaler", in_verify=True
    )
    mixed_precision: Precision | None = _precision(
        None, "no, bf16 or fp16; None takes what `accelerate launch` was told, else no", in_verify=True
    )
    accumulate_in_fp32: Flag = _precision(
        False, "sum the gradients of 16-bit weights in float32, and round them once", matters_to_rounding=True
    )
    on_inexact: OnInexact = _check(
        "warn", "what to do if accumulating the loss only approximates a large batch: error, warn or ignore"
    )
    audit: Audit = _check(
        True,
        "compare the gradient of some updates with that of one batch of their rows: true, false, or the updates "
        "between two audits",
    )
    on_nonfinite: OnNonfinite = _check(
        "skip", "what to do with an update whose loss or gradient is not finite: skip it, or error to end the run"
    )
    nonfinite_patience: PositiveInt | None = _check(
        25, "updates in a row that are not finite after which the run ends; None for any number"
    )
    deterministic: Flag = _repeat(
        False, "use deterministic algorithms only, which are slower", matters_to_rounding=True, in_verify=True
    )
    output_dir: Text | None = _output(
        None,
        "folder for the ledger, the result, checkpoints and the trained model",
        unsearchable=OWN_ARGUMENT,
    )
    checkpoint_every: Every | None = _output(
        "15min", "updates, or time (90s, 15min, 2h), between checkpoints; None: only at the ends of epochs"
    )
    keep_checkpoints: PositiveInt = _output(2, "newest checkpoints to keep, besides that of the best epoch")
    resume: Resume | None = _output(
        None, "auto resumes from the newest sound checkpoint in output_dir, if any; or a folder; off starts anew"
    )
    allow_changed: Names = _output((), "settings that may differ from those of the run that is resumed")
    log_with: Tracker | None = _logging(None, "tracker that Accelerate knows, such as tensorboard, or all")
    use_wandb: Flag = _logging(False, "short for log_with=wandb")
    progress: Flag = _logging(True, "show a progress bar", in_verify=True, unsearchable=OWN_ARGUMENT)


# Three ways to size an update; runs compare the effective batch size that they give.
SIZES = names_where(Recipe, lambda traits: traits.sizes_update)
# The names that `allow_changed` knows: what a resumed run must share with the run before.
CHANGEABLE = (
    *names_where(Recipe, lambda traits: not traits.sizes_update),
    *("effective_batch_size", "train_data", "val_data", "model", "optimizer", "loss_fn", "data_collator"),
)
