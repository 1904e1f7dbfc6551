"""Recipe and Runtime: every setting of a run with its unit, and all faults of a call reported at once.

A run is decided by its Recipe. The Runtime may change time and memory, never the result.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import SettingsError
from .fields import (
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
    Tracker,
    find_faults,
    read_settings,
    setting,
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is learned. Two runs with the same Recipe reach the same weights, up to rounding.

    How large an update is comes in three ways (k, rows, tokens); with the physical batch and the number of
    processes they are resolved to one effective batch size, once, at the start.
    """

    n_epochs: PositiveInt = setting(3, "passes over the training rows")
    max_updates: PositiveInt | None = setting(
        None, "updates after which training ends, if the epochs have not ended it before; None: the epochs alone"
    )
    gradient_accumulation_steps: Steps = setting(
        1,
        "micro-batches per update on each process (k); 0:2,100:8 for 2 at first and 8 from update 100 on; 1 leaves it "
        "to the two below, where one is given",
    )
    effective_batch_size: PositiveInt | None = setting(None, "rows per update over all processes; sets k")
    tokens_per_update: PositiveInt | None = setting(None, "tokens per update over all processes; sets k")
    remainder: Remainder = setting(
        "flush", "what is left of an epoch: flush makes an update of it, carry has the next epoch fill it up"
    )
    learning_rate: Positive = setting(5e-5, "peak learning rate")
    learning_rate_scaling: Scaling = setting(
        "none", "how the rate follows a k that changes: none, sqrt (adaptive optimizers) or linear (SGD)"
    )
    weight_decay: NonNegative = setting(0.01, "decoupled weight decay; biases and norms get none")
    lr_scheduler: Text = setting("linear", "name of a schedule that transformers' get_scheduler knows")
    warmup_steps: Count = setting(0, "updates of warm-up")
    warmup_ratio: Fraction = setting(0.0, "share of all updates that is warm-up, instead of a number of them")
    gradient_clip_norm: Positive | None = setting(1.0, "largest total gradient norm; None clips nothing")
    validation_split: Fraction = setting(
        0.1, "share of the training rows held out where no validation data is given; 0 holds out none"
    )
    early_stopping_patience: PositiveInt | None = setting(
        None, "epochs without a better validation loss after which training stops; None never stops"
    )
    restore_best_weights: Flag = setting(False, "end with the weights of the epoch of best validation loss")
    random_seed: Seed = setting(42, "seed of the hold-out, the order of the rows and dropout")


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How it is run: time and memory, not the result."""

    batch_size: BatchSize = setting(
        4, "rows of a micro-batch on one process (the physical batch); auto takes the most that fit in memory"
    )
    max_tokens: PositiveInt | None = setting(
        None, "positions of a micro-batch, padding included: micro-batches are cut by these instead of by rows"
    )
    planner: Flag = setting(True, "cut windows where it costs least; without, into equal slices in order of arrival")
    planner_costs: Costs | None = setting(
        None, "the cost of a pass: what it costs in any case, a padded token, a row's squared width; None measures it"
    )
    padding_free: Flag = setting(
        False, "lay the rows of a micro-batch one behind the other instead of padding them (causal LMs)"
    )
    num_workers: Count = setting(0, "processes that collate ahead, for rows that take long to make; 0 for none")
    compile: Flag = setting(False, "torch.compile the model; widths are padded to buckets, to bound their number")
    use_amp: Flag = setting(False, "autocast: bf16 where the device supports it, else fp16 with a scaler")
    mixed_precision: Precision | None = setting(
        None, "no, bf16 or fp16; None takes what `accelerate launch` was told, else no"
    )
    accumulate_in_fp32: Flag = setting(False, "sum up the gradients of 16-bit weights in float32, and round them once")
    gradient_checkpointing: Flag = setting(False, "recompute activations instead of keeping them")
    on_inexact: OnInexact = setting(
        "warn", "what to do where accumulating the loss only approximates a large batch: error, warn or ignore"
    )
    on_nonfinite: OnNonfinite = setting(
        "skip", "what to do with an update whose loss or gradient is not finite: skip it, or error to end the run"
    )
    nonfinite_patience: PositiveInt | None = setting(
        25, "updates in a row that are not finite after which the run ends; None for any number"
    )
    deterministic: Flag = setting(False, "use deterministic algorithms only, which are slower")
    output_dir: Text | None = setting(None, "folder for the ledger, the result, checkpoints and the trained model")
    checkpoint_every: Every | None = setting(
        "15min", "updates, or time (90s, 15min, 2h), between checkpoints; None: only at the ends of epochs"
    )
    keep_checkpoints: PositiveInt = setting(2, "newest checkpoints to keep, beside that of the best epoch")
    resume: Resume | None = setting(
        None,
        "auto goes on from the newest sound checkpoint in output_dir, if any; or a folder; off starts anew",
    )
    allow_changed: Names = setting((), "settings that may differ from those of the run that is gone on with")
    log_with: Tracker | None = setting(None, "tracker that Accelerate knows, such as tensorboard, or all")
    use_wandb: Flag = setting(False, "short for log_with=wandb")
    progress: Flag = setting(True, "show a progress bar")


# Three ways to say how large an update is, which counts as what they are resolved to.
SIZES = ("gradient_accumulation_steps", "effective_batch_size", "tokens_per_update")
# What a run that is gone on with is asked to have in common with itself.
CHANGEABLE = (
    *(f.name for f in fields(Recipe) if f.name not in SIZES),
    *("effective_batch_size", "train_data", "val_data", "model", "optimizer", "loss_fn", "data_collator"),
)


def parse_settings(given: Mapping[str, Any]) -> tuple[Recipe, Runtime]:
    """Sorts keyword arguments into a Recipe and a Runtime.

    Args:
        given: settings by name; one left out takes its default, and names of neither are passed over.

    Raises:
        SettingsError: with a sentence for each fault, all of them at once.
    """
    recipe, runtime = read_settings(Recipe, given), read_settings(Runtime, given)
    faults = find_faults(recipe) + find_faults(runtime)
    if not faults:  # the joint rules compare values, which must be sound for that
        faults = _joint_faults(recipe, runtime)
    if faults:
        raise SettingsError(faults)
    return recipe, runtime


def _joint_faults(recipe: Recipe, runtime: Runtime) -> list[str]:
    found = []
    if runtime.use_amp and runtime.mixed_precision == "no":
        found.append(
            "`use_amp` is True, but `mixed_precision` is 'no'. "
            "Leave `mixed_precision` out to have bf16 or fp16 chosen, or drop `use_amp`."
        )
    if runtime.use_wandb and runtime.log_with not in (None, "wandb"):
        found.append(
            f"`use_wandb` is True, but `log_with` is {runtime.log_with!r}. "
            "Give one of the two; `log_with='all'` uses every tracker that is installed."
        )
    if recipe.warmup_steps and recipe.warmup_ratio:
        found.append(
            f"`warmup_steps` is {recipe.warmup_steps} and `warmup_ratio` is {recipe.warmup_ratio}. "
            "Give the warm-up once, as a number of updates or as a share of them."
        )
    if runtime.planner_costs is not None and not runtime.planner:
        found.append("`planner_costs` is given, but `planner` is False. Drop one of them.")
    if unknown := [name for name in runtime.allow_changed if name not in CHANGEABLE]:
        found.append(f"`allow_changed` has {unknown}. What can be allowed to differ: {', '.join(CHANGEABLE)}.")
    if runtime.resume == "auto" and runtime.output_dir is None:
        found.append(
            "`resume` is 'auto', but `output_dir` is None, so that there is nowhere to look for checkpoints. Give "
            "`output_dir`, or the folder of a checkpoint."
        )
    if runtime.batch_size == "auto":
        found += _faults_of_auto(recipe, runtime)
    return found + faults_of_schedule(recipe)


def faults_of_schedule(settings: Any) -> list[str]:
    """A sentence for each setting that does not go with how k changes over training, or with its not changing.

    Args:
        settings: a Recipe, or whatever has those fields of it.
    """
    k, scaling = settings.gradient_accumulation_steps, settings.learning_rate_scaling
    if isinstance(k, int):
        if scaling == "none":
            return []
        return [
            f"`learning_rate_scaling` is {scaling!r}, but k is {k} from beginning to end, so that there is nothing to "
            "follow. Give `gradient_accumulation_steps` as pairs, such as '0:2,100:8', or leave it out."
        ]
    return [
        f"`gradient_accumulation_steps` is {k}, which says how large every update is, and so does `{name}`, "
        f"{getattr(settings, name)}. Give one of the two."
        for name in ("effective_batch_size", "tokens_per_update")
        if getattr(settings, name) is not None
    ]


def _faults_of_auto(recipe: Recipe, runtime: Runtime) -> list[str]:
    found = []
    if runtime.max_tokens is not None:
        found.append(
            "`batch_size` is 'auto', and `max_tokens` cuts micro-batches by tokens, not by rows. Give one of them."
        )
    if recipe.gradient_accumulation_steps != 1:
        found.append(
            f"`batch_size` is 'auto', so that `gradient_accumulation_steps` follows from it, but is given as "
            f"{recipe.gradient_accumulation_steps}. Give the size of an update as `effective_batch_size` or "
            "`tokens_per_update` instead: it must not depend on what fits in memory."
        )
    elif not (recipe.effective_batch_size or recipe.tokens_per_update):
        found.append(
            "`batch_size` is 'auto', which needs the size of an update: it must not depend on what fits in memory. Add "
            "`effective_batch_size=32`, say, or `tokens_per_update`."
        )
    return found
