"""Recipe and Runtime: the only declaration of each setting.

The Recipe determines the result of a run. The Runtime affects time and memory, never the result.
"""

from dataclasses import dataclass
from functools import partial

from .fields import (
    Count,
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
    Repository,
    Resume,
    Sampling,
    Save,
    Scaling,
    Seed,
    Text,
    TextNames,
    Tracker,
    Verbosity,
    names_where,
    setting,
)
from .rules.class_weights import ClassWeights
from .rules.optimization import OPTIMIZER_NAMES, LayerDecay, OptimizerGroups, OptimizerName, SchedulerOptions
from .rules.periods import Audit, EvaluateEvery, Every
from .rules.update_size import BatchSize, Costs, Steps

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

# Reasons why `search` cannot vary an argument.
_DECIDES_BEST = "it decides which trial is the best"
SAME_ROWS = "every trial trains on the same rows, in the same order and within the same budget of rows"
OWN_ARGUMENT = "it is an argument of the search itself"
_FROM_STEPS = "the effective batch sizes to try follow from `accumulation_steps`"
_FIXED_BATCH = "the physical batch of a search is fixed"

_data = partial(setting, group="model and data", in_verify=True, unsearchable=SAME_ROWS)
_loss = partial(_data, group="loss", unsearchable="it changes the validation loss, by which trials are compared")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings that determine what a model learns. Two runs with the same Recipe reach the same weights, up to
    rounding.

    Three settings can set the size of an update: k, rows or tokens. At the start of a run, they determine the effective
    batch size together with the physical batch and the number of processes. A resumed run must have the same Recipe,
    except for settings that `allow_changed` names.
    """

    text_columns: TextNames | None = _data(
        None,
        "column of raw text, or two columns for text pairs (premise,hypothesis); None takes the only text column",
        "--text_column",
    )
    add_eos_token: Flag = _data(True, "end each text of a causal LM with the tokenizer's end-of-text token")
    max_length: PositiveInt | None = _data(
        None, "most tokens of a row of raw text; None: as many as the tokenizer and the model accept"
    )
    sampler: Sampling = _data(
        "shuffle",
        "rows of an epoch: shuffle takes each once; balanced draws as many with replacement, evenly from all classes",
        in_verify=False,
        decided_by_search=True,  # whose own `sampler` proposes trials
    )
    class_weights: ClassWeights | None = _loss(
        None,
        "weight of each class in the model's own loss: balanced (rare classes weigh more), or one number per class "
        "(1,2.5); None weights all classes equally",
    )
    label_smoothing: Fraction = _loss(
        0.0,
        "share of each target that the model's own loss spreads evenly over all classes, as torch's CrossEntropyLoss",
    )
    n_epochs: PositiveInt = _training(3, "passes over the training rows", in_plan=True, unsearchable=SAME_ROWS)
    max_updates: PositiveInt | None = _training(
        None,
        "updates after which training ends, unless the epochs end it earlier; None trains all epochs",
        in_plan=True,
        decided_by_search=True,
        unsearchable=SAME_ROWS,
    )
    gradient_accumulation_steps: Steps = _asked_size(
        1,
        "micro-batches per update on each process (k); 0:2,100:8 means 2 for the first 100 updates and 8 after them; "
        "leave at 1 to set effective_batch_size or tokens_per_update",
        unsearchable=OWN_ARGUMENT,
    )
    effective_batch_size: PositiveInt | None = _asked_size(
        None, "rows per update over all processes; sets gradient_accumulation_steps", unsearchable=_FROM_STEPS
    )
    tokens_per_update: PositiveInt | None = _asked_size(
        None, "tokens per update over all processes; sets gradient_accumulation_steps", unsearchable=_FROM_STEPS
    )
    remainder: Remainder = _size(
        "flush",
        "rows left at the end of an epoch: flush makes a smaller update of them, carry fills it up from the next epoch",
        in_plan=True,
        unsearchable=SAME_ROWS,
    )
    optimizer: OptimizerName | None = _optimization(
        None, f"{OPTIMIZER_NAMES}; in Python also a function of the parameter groups, or an instance; None: adamw"
    )
    learning_rate: Positive = _optimization(
        5e-5, "peak learning rate", decided_by_search=True, unsearchable=OWN_ARGUMENT
    )
    learning_rate_scaling: Scaling = _optimization(
        "none",
        "how the learning rate follows a changing gradient_accumulation_steps: none, sqrt (adaptive optimizers) or "
        "linear (SGD)",
        in_plan=True,
        decided_by_search=True,
        unsearchable=_FROM_STEPS,
    )
    weight_decay: NonNegative = _optimization(0.01, "decoupled weight decay; none for biases and norms")
    adam_beta1: Fraction | None = _optimization(None, "beta1 of an optimizer by name; None: its own, mostly 0.9")
    adam_beta2: Fraction | None = _optimization(None, "beta2 of an optimizer by name; None: its own, mostly 0.999")
    layerwise_lr_decay: LayerDecay | None = _optimization(None, "factor of the rate from each layer to the one below")
    head_learning_rate: Positive | None = _optimization(None, "peak learning rate of the head; None: learning_rate")
    optimizer_groups: OptimizerGroups | None = _optimization(
        None, 'lr and weight_decay by regular expression for names, as JSON or a dict: {"embeddings": {"lr": 1e-5}}'
    )
    lr_scheduler: Text = _optimization("linear", "name of a schedule that transformers' get_scheduler accepts")
    lr_scheduler_kwargs: SchedulerOptions | None = _optimization(
        None, 'options of the schedule, such as {"min_lr_rate": 0.1} for cosine_with_min_lr, as JSON or a dict'
    )
    warmup_steps: Count = _optimization(0, "number of warm-up updates")
    warmup_ratio: Fraction = _optimization(0.0, "share of all updates used for warm-up, instead of warmup_steps")
    gradient_clip_norm: Positive | None = _optimization(1.0, "largest total gradient norm; None disables clipping")
    validation_split: Fraction = _evaluation(
        0.1,
        "share of the training rows to hold out if there is no validation data; 0 holds out none",
        in_plan=True,
        unsearchable=SAME_ROWS,
    )
    evaluate_every: EvaluateEvery | None = _evaluation(
        None,
        "updates between two evaluations, or a share of an epoch (0.25, or 25%); None evaluates after each epoch",
        decided_by_search=True,
        unsearchable="a search evaluates all trials after the same numbers of rows",
    )
    metric_for_best: Text | None = _evaluation(
        None,
        "metric that decides which evaluation is the best, by its name in the results of compute_metrics; None takes "
        "the validation loss",
        unsearchable=_DECIDES_BEST,
    )
    greater_is_better: Flag | None = _evaluation(
        None,
        "whether greater values of metric_for_best are better; None decides by its name (accuracy, mse, …)",
        unsearchable=_DECIDES_BEST,
    )
    early_stopping_patience: PositiveInt | None = _evaluation(
        None,
        "stop after this many evaluations without a better one; None never stops early",
        decided_by_search=True,
        unsearchable="trials would train on different numbers of rows; a pruner ends bad trials instead",
    )
    early_stopping_min_delta: NonNegative = _evaluation(
        0.0,
        "smallest improvement that early stopping counts as better",
        decided_by_search=True,
        unsearchable="trials do not stop early; a pruner ends bad trials instead",
    )
    restore_best_weights: Flag = _evaluation(False, "end with the weights of the best evaluation")
    random_seed: Seed = _repeat(
        42,
        "seed of the hold-out, the row order and dropout",
        in_plan=True,
        in_verify=True,
        decided_by_search=True,
        unsearchable=SAME_ROWS,
    )


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The settings that affect time and memory, not the result. A resumed run may have a different Runtime."""

    batch_size: BatchSize = _size(
        4,
        "rows per micro-batch on one process (the physical batch); auto takes as many as fit in memory",
        in_verify=True,
        unsearchable=_FIXED_BATCH,
    )
    eval_batch_size: PositiveInt | None = _evaluation(
        None,
        "rows per batch of an evaluation on one process; None takes as many as batch_size",
        unsearchable=_FIXED_BATCH,
    )
    max_tokens: PositiveInt | None = _cut(
        None,
        "most positions per micro-batch, padding included; limits micro-batches by positions instead of rows",
        unsearchable=_FIXED_BATCH,
    )
    planner: Flag = _cut(
        True, "split each update into the micro-batches that cost least; False: equal ones in order of arrival"
    )
    planner_costs: Costs | None = _cut(
        None,
        "cost of a forward and backward pass: constant, per token (padding included), and per row × squared length; "
        "None takes 64, 1 and 0.0005",
    )
    padding_free: Flag = _cut(False, "concatenate the rows of a micro-batch instead of padding them (causal LMs)")
    gradient_checkpointing: Flag = _cut(False, "recompute activations in the backward pass to save memory")
    compile: Flag = _speed(
        False, "torch.compile the model; widths are padded to buckets to limit the shapes", matters_to_rounding=True
    )
    num_workers: Count = _speed(0, "processes that collate batches ahead, for rows that are slow to make; 0 for none")
    preprocessing_num_workers: PositiveInt | None = _speed(
        None, "processes that tokenise raw text before training; None tokenises in the main process"
    )
    use_amp: Flag = _precision(
        False, "autocast: bf16 where the device supports it, else fp16 with a scaler", in_verify=True
    )
    mixed_precision: Precision | None = _precision(
        None, "no, bf16 or fp16; None takes the value of `accelerate launch`, else no", in_verify=True
    )
    accumulate_in_fp32: Flag = _precision(
        False, "sum the gradients of 16-bit weights in float32 and round them once", matters_to_rounding=True
    )
    on_inexact: OnInexact = _check(
        "warn", "what to do if accumulating the loss only approximates a large batch: error, warn or ignore"
    )
    audit: Audit = _check(
        True,
        "compare the gradient of some updates with the gradient of one batch of the same rows: true, false, or the "
        "number of updates between two audits",
    )
    on_nonfinite: OnNonfinite = _check(
        "skip", "what to do with an update whose loss or gradient is not finite: skip it, or error to end the run"
    )
    nonfinite_patience: PositiveInt | None = _check(
        25, "end the run after this many consecutive updates that are not finite; None never ends it"
    )
    deterministic: Flag = _repeat(
        False, "use only deterministic algorithms, which are slower", matters_to_rounding=True, in_verify=True
    )
    output_dir: Text | None = _output(
        None,
        "folder for the ledger, the result, the checkpoints and the trained model",
        unsearchable=OWN_ARGUMENT,
    )
    save: Save = _output(
        "adapter",
        "files of the trained model, if it has adapters: adapter, merged (a plain model that loads without peft), or "
        "both",
        unsearchable="trials save no model",
    )
    checkpoint_every: Every | None = _output(
        "15min",
        "number of updates, or time (90s, 15min, 2h), between checkpoints; None saves only after epochs and the best "
        "evaluation",
    )
    keep_checkpoints: Count = _output(
        2,
        "number of newest checkpoints to keep during the run, besides the best evaluation's; a finished run keeps the "
        "newest, or none if this is 0",
    )
    resume: Resume | None = _output(
        None, "auto resumes from the newest sound checkpoint in output_dir, if any; or a folder to resume from; or off"
    )
    allow_changed: Names = _output((), "settings that may differ from those of the resumed run")
    push_to_hub: Repository | None = _output(
        None,
        "repository on the Hugging Face Hub (user/name) to upload the trained model to; a new one is private",
        unsearchable="trials upload no model",
    )
    log_every: PositiveInt = _logging(
        10, "updates between two tracker entries, each the mean over the updates since the last"
    )
    log_with: Tracker | None = _logging(None, "name of a tracker that Accelerate supports, such as tensorboard, or all")
    use_wandb: Flag = _logging(False, "short for log_with=wandb")
    progress: Flag = _logging(True, "show a progress bar", in_verify=True, unsearchable=OWN_ARGUMENT)
    verbosity: Verbosity = _logging(
        "normal",
        "how much to print: quiet (only warnings), normal, or debug (also messages for finding faults)",
        in_verify=True,
        unsearchable=OWN_ARGUMENT,
    )

    @property
    def is_quiet(self) -> bool:
        """Whether the run prints nothing but warnings."""
        return self.verbosity == "quiet"

    @property
    def shows_bars(self) -> bool:
        """Whether the run shows progress bars."""
        return self.progress and not self.is_quiet


# Alternative ways to set the size of an update; runs compare the resulting effective batch size.
SIZES = names_where(Recipe, lambda traits: traits.sizes_update)
# The names that `allow_changed` accepts: what a resumed run must otherwise share with the previous run.
CHANGEABLE = (
    *names_where(Recipe, lambda traits: not traits.sizes_update),
    *("effective_batch_size", "train_data", "val_data", "model", "loss_fn", "data_collator", "lora"),
)
