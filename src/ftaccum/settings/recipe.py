"""The Recipe: the settings that determine the result of a run."""

from dataclasses import dataclass

from ..fields import (
    Balance,
    Count,
    Flag,
    Fraction,
    LossOver,
    NonNegative,
    Positive,
    PositiveInt,
    Remainder,
    Sampling,
    Scaling,
    Seed,
    Text,
    TextNames,
    names_where,
)
from ..rules.class_weights import ClassWeights
from ..rules.optimization import OPTIMIZER_NAMES, LayerDecay, OptimizerGroups, OptimizerName, SchedulerOptions
from ..rules.periods import EvaluateEvery
from ..rules.update_size import Steps
from .groups import (
    DECIDES_BEST,
    FROM_STEPS,
    OWN_ARGUMENT,
    SAME_ROWS,
    asked_size,
    data,
    evaluation,
    loss,
    optimization,
    repeat,
    size,
    training,
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings that determine what a model learns. Two runs with the same Recipe reach the same weights, up to
    rounding.

    Three settings can set the size of an update: k, rows or tokens. At the start of a run, they determine the effective
    batch size together with the physical batch and the number of processes. A resumed run must have the same Recipe,
    except for settings that `allow_changed` names.
    """

    text_columns: TextNames | None = data(
        None,
        "column of raw text, or two columns for text pairs (premise,hypothesis); None takes the only text column",
        "--text_column",
    )
    add_eos_token: Flag = data(True, "end each text of a causal LM with the tokenizer's end-of-text token")
    max_length: PositiveInt | None = data(
        None, "most tokens of a row of raw text; None: as many as the tokenizer and the model accept"
    )
    sampler: Sampling = data(
        "shuffle",
        "rows of an epoch: shuffle takes each once; balanced draws as many with replacement, evenly from all classes",
        in_verify=False,
        decided_by_search=True,  # whose own `sampler` proposes trials
    )
    class_weights: ClassWeights | None = loss(
        None,
        "weight of each class in the model's own loss: balanced (rare classes weigh more), or one number per class "
        "(1,2.5); None weights all classes equally",
    )
    label_smoothing: Fraction = loss(
        0.0,
        "share of each target that the model's own loss spreads evenly over all classes, as torch's CrossEntropyLoss",
    )
    loss_over: LossOver = loss(
        "items",
        "what loss_fn reads: items, if it is a mean over the rows or labels of a micro-batch; or window, all rows of "
        "an update together, as a contrastive loss does",
    )
    router_balance: Balance = loss(
        "window",
        "tokens over which the load-balancing loss of a mixture of experts is computed: those of the window (the whole "
        "update), which takes two forward passes, or of each micro_batch, which only approximates it",
    )
    n_epochs: PositiveInt = training(3, "passes over the training rows", in_plan=True, unsearchable=SAME_ROWS)
    max_updates: PositiveInt | None = training(
        None,
        "updates after which training ends, unless the epochs end it earlier; None trains all epochs",
        in_plan=True,
        decided_by_search=True,
        unsearchable=SAME_ROWS,
    )
    gradient_accumulation_steps: Steps = asked_size(
        1,
        "micro-batches per update on each process (k); 0:2,100:8 means 2 for the first 100 updates and 8 after them; "
        "leave at 1 to set effective_batch_size or tokens_per_update",
        unsearchable=OWN_ARGUMENT,
    )
    effective_batch_size: PositiveInt | None = asked_size(
        None, "rows per update over all processes; sets gradient_accumulation_steps", unsearchable=FROM_STEPS
    )
    tokens_per_update: PositiveInt | None = asked_size(
        None, "tokens per update over all processes; sets gradient_accumulation_steps", unsearchable=FROM_STEPS
    )
    remainder: Remainder = size(
        "flush",
        "rows left at the end of an epoch: flush makes a smaller update of them, carry fills it up from the next epoch",
        in_plan=True,
        unsearchable=SAME_ROWS,
    )
    optimizer: OptimizerName | None = optimization(
        None, f"{OPTIMIZER_NAMES}; in Python also a function of the parameter groups, or an instance; None: adamw"
    )
    learning_rate: Positive = optimization(
        5e-5, "peak learning rate", decided_by_search=True, unsearchable=OWN_ARGUMENT
    )
    learning_rate_scaling: Scaling = optimization(
        "none",
        "how the learning rate follows a changing gradient_accumulation_steps: none, sqrt (adaptive optimizers) or "
        "linear (SGD)",
        in_plan=True,
        decided_by_search=True,
        unsearchable=FROM_STEPS,
    )
    weight_decay: NonNegative = optimization(0.01, "decoupled weight decay; none for biases and norms")
    adam_beta1: Fraction | None = optimization(None, "beta1 of an optimizer by name; None: its own, mostly 0.9")
    adam_beta2: Fraction | None = optimization(None, "beta2 of an optimizer by name; None: its own, mostly 0.999")
    layerwise_lr_decay: LayerDecay | None = optimization(None, "factor of the rate from each layer to the one below")
    head_learning_rate: Positive | None = optimization(None, "peak learning rate of the head; None: learning_rate")
    optimizer_groups: OptimizerGroups | None = optimization(
        None, 'lr and weight_decay by regular expression for names, as JSON or a dict: {"embeddings": {"lr": 1e-5}}'
    )
    lr_scheduler: Text = optimization("linear", "name of a schedule that transformers' get_scheduler accepts")
    lr_scheduler_kwargs: SchedulerOptions | None = optimization(
        None, 'options of the schedule, such as {"min_lr_rate": 0.1} for cosine_with_min_lr, as JSON or a dict'
    )
    warmup_steps: Count = optimization(0, "number of warm-up updates")
    warmup_ratio: Fraction = optimization(0.0, "share of all updates used for warm-up, instead of warmup_steps")
    gradient_clip_norm: Positive | None = optimization(1.0, "largest total gradient norm; None disables clipping")
    validation_split: Fraction = evaluation(
        0.1,
        "share of the training rows to hold out if there is no validation data; 0 holds out none",
        in_plan=True,
        unsearchable=SAME_ROWS,
    )
    evaluate_every: EvaluateEvery | None = evaluation(
        None,
        "updates between two evaluations, or a share of an epoch (0.25, or 25%); None evaluates after each epoch",
        decided_by_search=True,
        unsearchable="a search evaluates all trials after the same numbers of rows",
    )
    metric_for_best: Text | None = evaluation(
        None,
        "metric that decides which evaluation is the best, by its name in the results of compute_metrics; None takes "
        "the validation loss",
        unsearchable=DECIDES_BEST,
    )
    greater_is_better: Flag | None = evaluation(
        None,
        "whether greater values of metric_for_best are better; None decides by its name (accuracy, mse, …)",
        unsearchable=DECIDES_BEST,
    )
    early_stopping_patience: PositiveInt | None = evaluation(
        None,
        "stop after this many evaluations without a better one; None never stops early",
        decided_by_search=True,
        unsearchable="trials would train on different numbers of rows; a pruner ends bad trials instead",
    )
    early_stopping_min_delta: NonNegative = evaluation(
        0.0,
        "smallest improvement that early stopping counts as better",
        decided_by_search=True,
        unsearchable="trials do not stop early; a pruner ends bad trials instead",
    )
    restore_best_weights: Flag = evaluation(False, "end with the weights of the best evaluation")
    random_seed: Seed = repeat(
        42,
        "seed of the hold-out, the row order and dropout",
        in_plan=True,
        in_verify=True,
        decided_by_search=True,
        unsearchable=SAME_ROWS,
    )


# Alternative ways to set the size of an update; runs compare the resulting effective batch size.
SIZES = names_where(Recipe, lambda traits: traits.sizes_update)
# The names that `allow_changed` accepts: what a resumed run must otherwise share with the previous run.
CHANGEABLE = (
    *names_where(Recipe, lambda traits: not traits.sizes_update),
    *("effective_batch_size", "train_data", "val_data", "model", "model_config", "loss_fn", "loss_inputs"),
    *("data_collator", "lora"),
)
