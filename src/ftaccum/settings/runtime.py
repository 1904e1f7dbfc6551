"""The Runtime: the settings that affect time and memory, never the result."""

from dataclasses import dataclass

from ..fields import (
    Count,
    Flag,
    FlagOrFolder,
    LossHead,
    Names,
    OnInexact,
    OnNonfinite,
    PositiveInt,
    Precision,
    Resume,
    Save,
    Sharding,
    Sync,
    Text,
    Tracker,
    Verbosity,
)
from ..rules.periods import Audit, Every, NoiseScale
from ..rules.repository import Repository
from ..rules.update_size import Costs, SizeOrAuto
from .groups import FIXED_BATCH, OWN_ARGUMENT, check, cut, evaluation, logging, output, precision, repeat, size, speed


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The settings that affect time and memory, not the result. A resumed run may have a different Runtime."""

    batch_size: SizeOrAuto = size(
        4,
        "rows per micro-batch on one process (the physical batch); auto takes as many as fit in memory",
        in_verify=True,
        unsearchable=FIXED_BATCH,
    )
    eval_batch_size: PositiveInt | None = evaluation(
        None,
        "rows per batch of an evaluation on one process; None takes as many as batch_size",
        unsearchable=FIXED_BATCH,
    )
    max_tokens: SizeOrAuto | None = cut(
        None,
        "most positions per micro-batch, padding included; limits micro-batches by positions instead of rows; auto "
        "takes batch_size × the longest training row",
        unsearchable=FIXED_BATCH,
    )
    planner: Flag = cut(
        True, "split each update into the micro-batches that cost least; False: equal ones in order of arrival"
    )
    planner_costs: Costs | None = cut(
        None,
        "cost of a forward and backward pass: constant, per token (padding included), and per row × squared length; "
        "None takes 64, 1 and 0.0005",
    )
    padding_free: Flag = cut(False, "concatenate the rows of a micro-batch instead of padding them (causal LMs)")
    loss_head: LossHead = cut(
        "auto",
        "positions at which a language model computes logits, and another model its last layer (on a CPU): auto takes "
        "those that the loss reads, if that gives the model's own loss and gradient; full takes all",
    )
    gradient_checkpointing: Flag = cut(False, "recompute activations in the backward pass to save memory")
    compile: Flag = speed(
        False, "torch.compile the model; widths are padded to buckets to limit the shapes", matters_to_rounding=True
    )
    num_workers: Count = speed(0, "processes that collate batches ahead, for rows that are slow to make; 0 for none")
    preprocessing_num_workers: PositiveInt | None = speed(
        None, "processes that tokenize raw text before training; None tokenizes in the main process"
    )
    sharding: Sharding | None = speed(
        None,
        "fsdp2 shards weights, gradients and optimizer state over the processes; off: whole copies on each; None "
        "follows the config file of accelerate launch",
        matters_to_rounding=True,
    )
    sync: Sync = speed(
        "each",
        "with sharding, the passes of an update that sync gradients: each one, or only the last, which is faster but "
        "needs memory for whole gradients",
        matters_to_rounding=True,
    )
    use_amp: Flag = precision(
        False, "autocast: bf16 where the device supports it, else fp16 with a scaler", in_verify=True
    )
    mixed_precision: Precision | None = precision(
        None, "no, bf16 or fp16; None takes the value of `accelerate launch`, else no", in_verify=True
    )
    accumulate_in_fp32: Flag = precision(
        False, "sum the gradients of 16-bit weights in float32 and round them once", matters_to_rounding=True
    )
    on_inexact: OnInexact = check(
        "warn", "what to do if accumulating the loss only approximates a large batch: error, warn or ignore"
    )
    audit: Audit = check(
        True,
        "compare the gradient of some updates with the gradient of one batch of the same rows: true, false, or the "
        "number of updates between two audits",
    )
    noise_scale: NoiseScale = check(
        "auto",
        "measure in some updates how much of the gradient is noise, which shows whether more rows per update would "
        "help: the number of updates from one measurement to the next, or false; auto takes every tenth update of a "
        "run of 80 or more, and none with deterministic",
        matters_to_rounding=True,
    )
    self_check_cache: FlagOrFolder = check(
        True,
        "keep the verdict of the check before training in a folder, and only confirm it in later runs with the same "
        "installed code, model config and labels in the rows that it measures: true (in the user's cache folder), "
        "false, or a folder",
        unsearchable=OWN_ARGUMENT,
    )
    on_nonfinite: OnNonfinite = check(
        "skip", "what to do with an update whose loss or gradient is not finite: skip it, or error to end the run"
    )
    nonfinite_patience: PositiveInt | None = check(
        25, "end the run after this many consecutive updates that are not finite; None never ends it"
    )
    deterministic: Flag = repeat(
        False, "use only deterministic algorithms, which are slower", matters_to_rounding=True, in_verify=True
    )
    output_dir: Text | None = output(
        None,
        "folder for the ledger, the result, the checkpoints and the trained model",
        unsearchable=OWN_ARGUMENT,
    )
    save: Save = output(
        "adapter",
        "files of the trained model, if it has adapters: adapter, merged (a plain model that loads without peft), or "
        "both",
        unsearchable="trials save no model",
    )
    checkpoint_every: Every | None = output(
        "15min",
        "number of updates, or time (90s, 15min, 2h), between checkpoints; None saves only after epochs and the best "
        "evaluation",
    )
    keep_checkpoints: Count = output(
        2,
        "number of newest checkpoints to keep during the run, besides the best evaluation's; a finished run keeps the "
        "newest, or none if this is 0",
    )
    resume: Resume | None = output(
        None, "auto resumes from the newest sound checkpoint in output_dir, if any; or a folder to resume from; or off"
    )
    allow_changed: Names = output((), "settings that may differ from those of the resumed run")
    push_to_hub: Repository | None = output(
        None,
        "repository on the Hugging Face Hub (user/name) to upload the trained model to; a new one is private",
        unsearchable="trials upload no model",
    )
    log_every: PositiveInt = logging(
        10, "updates between two tracker entries, each the mean over the updates since the last"
    )
    log_with: Tracker | None = logging(
        None, "tensorboard, wandb, mlflow, trackio, another tracker that Accelerate supports, or all"
    )
    use_wandb: Flag = logging(False, "short for log_with=wandb")
    progress: Flag = logging(
        True,
        "show progress bars in a terminal or a notebook",
        in_verify=True,
        unsearchable=OWN_ARGUMENT,
    )
    verbosity: Verbosity = logging(
        "normal",
        "how much to print: quiet (only warnings), normal, or debug (also details, such as why all logits are "
        "computed)",
        in_verify=True,
        unsearchable=OWN_ARGUMENT,
    )

    @property
    def limits_tokens_automatically(self) -> bool:
        """Whether the longest training row determines the most tokens of a micro-batch."""
        return self.max_tokens == "auto"

    @property
    def token_limit(self) -> int | None:
        """The most tokens of a micro-batch, if it is a given number."""
        return None if isinstance(self.max_tokens, str) else self.max_tokens

    @property
    def is_quiet(self) -> bool:
        """Whether the run prints nothing but warnings."""
        return self.verbosity == "quiet"

    @property
    def shows_bars(self) -> bool:
        """Whether the run shows progress bars."""
        return self.progress and not self.is_quiet
