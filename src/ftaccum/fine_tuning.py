"""`test_fine_tuning`, the main entry point of ftaccum."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from .data.collator import Collator
from .fields import DefaultFloat
from .objective.item_counts import CountItems
from .objective.model_forward import LossFn
from .objective.window_loss import LossInputs
from .porting.keywords import explain_keywords
from .rules.update_size import Pairs
from .runtime.progress_bar import is_interactive
from .tracking.result import Result
from .training.config import RunConfig
from .training.metrics import ComputeMetrics, PreprocessLogits
from .training.optimizer import OptimizerFactory
from .training.run import run_training


@explain_keywords()
def test_fine_tuning(
    model: nn.Module,
    config: Any = None,
    train_data: Any = None,
    val_data: Any = None,
    *,
    validation_split: float = 0.1,
    text_columns: str | Sequence[str] | None = None,
    add_eos_token: bool = True,
    max_length: int | None = None,
    sampler: str = "shuffle",
    n_epochs: int = 3,
    max_updates: int | None = None,
    batch_size: int | str = 4,
    gradient_accumulation_steps: int | str | Pairs = 1,
    effective_batch_size: int | None = None,
    tokens_per_update: int | None = None,
    remainder: str = "flush",
    max_tokens: int | str | None = None,
    planner: bool = True,
    planner_costs: Sequence[float] | None = None,
    padding_free: bool = False,
    loss_head: str = "auto",
    optimizer: str | OptimizerFactory | Optimizer | None = None,
    learning_rate: float = DefaultFloat(5e-5),
    learning_rate_scaling: str = "none",
    weight_decay: float = DefaultFloat(0.01),
    adam_beta1: float | None = None,
    adam_beta2: float | None = None,
    layerwise_lr_decay: float | None = None,
    head_learning_rate: float | None = None,
    optimizer_groups: Sequence[Mapping[str, Any]] | Mapping[str, Mapping[str, float]] | str | None = None,
    lr_scheduler: str = "linear",
    lr_scheduler_kwargs: Mapping[str, Any] | str | None = None,
    warmup_steps: int = 0,
    warmup_ratio: float = 0.0,
    gradient_clip_norm: float | None = 1.0,
    use_amp: bool = False,
    mixed_precision: str | None = None,
    accumulate_in_fp32: bool = False,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    num_workers: int = 0,
    preprocessing_num_workers: int | None = None,
    sharding: str | None = None,
    sync: str = "each",
    lora: Any = None,
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
    compute_metrics: ComputeMetrics | None = None,
    preprocess_logits_for_metrics: PreprocessLogits | None = None,
    generation_kwargs: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    evaluate_every: int | float | str | None = None,
    eval_batch_size: int | None = None,
    metric_for_best: str | None = None,
    greater_is_better: bool | None = None,
    early_stopping_patience: int | None = None,
    early_stopping_min_delta: float = 0.0,
    restore_best_weights: bool = False,
    random_seed: int = 42,
    on_inexact: str = "warn",
    audit: bool | int = True,
    noise_scale: int | str = "auto",
    self_check_cache: bool | str = True,
    on_nonfinite: str = "skip",
    nonfinite_patience: int | None = 25,
    deterministic: bool = False,
    output_dir: str | None = None,
    save: str = "adapter",
    checkpoint_every: int | str | None = "15min",
    keep_checkpoints: int = 2,
    resume: str | None = None,
    allow_changed: str | Sequence[str] = (),
    push_to_hub: str | None = None,
    log_every: int = 10,
    log_with: Any = None,
    use_wandb: bool = False,
    progress: bool = True,
    verbosity: str = "normal",
) -> Result:
    """Fine-tune a model with gradient accumulation that is exactly a large batch.

    For every update, the gradient before clipping is that of the mean loss over all loss items (tokens, rows, …) of the
    effective batch, on all processes. How the batch is split into micro-batches makes no difference. The model is
    trained in place.

    Args:
        model: a `PreTrainedModel`, a PEFT model, or any module.
        config: the model's configuration, or any object with `vocab_size` and `pad_token_id`. None: `model.config`.
        train_data: a `datasets.Dataset` (tokenized, or raw text with `tokenizer`), a list of dicts, a pandas
            DataFrame, a dict of columns, a list of 1-D tensors of token ids (trained on next-token loss), or a torch
            `Dataset` of dicts or, with `loss_fn`, of `(inputs, targets)` tuples. A stream of such rows
            (`IterableDataset` of `datasets` or torch) needs `max_updates`; the main process reads it for all
            processes, and updates take its rows in order. None: synthetic token ids below `config.vocab_size`.
        val_data: validation data, in any of these forms except a stream.
        validation_split: share of the training rows to hold out for validation if `val_data` is None; 0 holds out
            none. A stream cannot hold out rows: pass `val_data`, or set this to 0.
        text_columns: the column of raw text to train on, or two columns for text pairs, such as
            ("premise", "hypothesis"). None takes the only text column besides the labels (`labels`, `label` or
            `label_ids`), and raises an error if there are several.
        add_eos_token: end each text of a causal LM with the tokenizer's end-of-text token, so that the model learns to
            stop. Texts that already end with it, and texts that are truncated, get none. False adds no token.
        max_length: most tokens of a row of raw text. Longer rows are truncated, and a warning counts them. None: as
            many as the tokenizer and the model accept.
        sampler: which rows an epoch takes. "shuffle": each once, in random order. "balanced": as many draws as rows,
            with replacement. Each draws a class with equal probability, and then one of its rows. Rows need one label
            each: an integer, a string or a boolean. Not for streams.
        n_epochs: passes over the training rows; for a stream, the maximum number of passes.
        max_updates: updates (including skipped ones) after which training ends, unless the epochs end it earlier. The
            learning rate schedule is planned for this end.
        batch_size: rows per micro-batch on one process. This is an upper limit: the planner may use fewer rows if that
            is cheaper. "auto" finds by trial, before the first update, how many of the longest rows fit in memory; it
            requires `effective_batch_size` or `tokens_per_update`.
        gradient_accumulation_steps: k, the number of micro-batches per update on each process. Pairs (from_update, k)
            change k during training: [(0, 2), (100, 8)], or "0:2,100:8" as text, makes updates four times as large
            from the 101st update on. Leave it at 1 if you set `effective_batch_size` or `tokens_per_update`.
        effective_batch_size: rows per update over all processes. Sets k to ⌈rows / (batch_size × processes)⌉; the last
            micro-batch may be smaller.
        tokens_per_update: tokens per update over all processes, those of all texts of a row. Divided by the mean tokens
            of a row (for a stream, of the first 256), it gives the rows per update.
        remainder: what to do with the rows at the end of an epoch that are too few for a full update. "flush" makes a
            smaller update of them. "carry" fills the update up with the first rows of the next epoch, so that only the
            last update of the run may be smaller. Such an update counts towards the epoch of its last row, and an
            epoch may have no update.
        max_tokens: maximum positions per micro-batch, padding included. If set, it limits micro-batches instead of
            `batch_size`, which then only helps to determine the size of an update. "auto" takes `batch_size` × the
            longest training row, so short rows make fewer and larger micro-batches. Refused for rows that need memory
            for more than their `input_ids`, for models that mix the rows of a micro-batch, and for streams. Both
            are refused for rows with several texts.
        planner: split each window where it costs least, once its rows are drawn. False splits it into equal slices in
            order of arrival. The update is the same either way.
        planner_costs: costs of a forward and backward pass, in any unit: per pass, per padded token, and per row ×
            squared width. None: 64, 1 and 0.0005. Raise the first on a device where any pass, however small, costs as
            much as many hundred tokens: the planner then makes fewer passes.
        padding_free: concatenate the rows of a micro-batch instead of padding them. For causal language models that
            keep such rows apart by `position_ids`; this is checked before training.
        loss_head: "auto" computes the logits of a language model only at labelled positions, and on a CPU the last
            layer of another model only at the positions that its head reads, if a check before training shows that loss
            and gradient equal the model's own. Otherwise, and with "full", all positions are computed.
        optimizer: a name, a function that builds an optimizer from parameter groups (each with `lr` and
            `weight_decay`), or an optimizer. The names are "adamw", "sgd" (without momentum), "adafactor", "lion",
            "muon" (hidden matrices; AdamW for all else), "adamw_8bit", "paged_adamw_8bit" and "schedule_free_adamw".
            Those that are not torch's need the extra `ftaccum[optimizers]`. A rate or decay that a function sets
            (`lambda groups: SGD(groups, lr=0.1)`) takes effect and is printed. It is an error if it differs from a
            `learning_rate` or `weight_decay` that you pass. None: AdamW.
        learning_rate: peak learning rate.
        learning_rate_scaling: how the learning rate follows a changing k. The rate of the schedule is multiplied by 1
            ("none"), by k/k0 ("linear", for SGD: Goyal et al. 2017, arXiv:1706.02677) or by √(k/k0) ("sqrt", for
            adaptive optimizers such as Adam: Malladi et al. 2022, arXiv:2205.10287), where k0 is the first k.
        weight_decay: decoupled weight decay; none for biases and norms. With "sgd", an L2 penalty.
        adam_beta1: β1 of an optimizer that has a name. None: its own, 0.9.
        adam_beta2: β2 of an optimizer that has a name. None: its own, 0.999 ("lion": 0.99).
        layerwise_lr_decay: factor of the learning rate from each layer to the one below it: learning_rate · decay^d for
            weights d layers below the head; 1 for the top layer. The layers are the model's longest `nn.ModuleList`
            that is in no other one. Embeddings are below all layers.
        head_learning_rate: peak learning rate of the weights outside the base model (`model.base_model_prefix`).
        optimizer_groups: `lr`, `weight_decay` or both for the parameters in whose names a regular expression is found
            (`re.search`): {"embeddings": {"lr": 1e-5}}, or a list of {"pattern": …, "lr": …, "weight_decay": …}. The
            first match counts, and counts more than the two arguments above.
        lr_scheduler: a name that Transformers' `get_scheduler` accepts. The schedule steps once per successful update,
            and scales the rate of each group.
        lr_scheduler_kwargs: options of the schedule, such as {"min_lr_rate": 0.1} for "cosine_with_min_lr".
        warmup_steps: number of warm-up updates.
        warmup_ratio: share of all updates used for warm-up, instead of `warmup_steps`.
        gradient_clip_norm: largest total norm of an update's gradient. None disables clipping; norms are still
            recorded.
        use_amp: autocast to bf16 where the device supports it, else to fp16 with a gradient scaler.
        mixed_precision: "no", "bf16" or "fp16". None takes the value of `accelerate launch`, else "no".
        accumulate_in_fp32: for weights in bf16 or fp16, whose gradients are otherwise summed in 16 bits: sum them over
            micro-batches and processes, measure and clip them in float32, and round them once, for the optimizer. Takes
            2 more bytes per trainable weight on a single process, none on several. No effect on wider weights.
        gradient_checkpointing: recompute activations in the backward pass to save memory (Transformers models).
        compile: `torch.compile` the model. Widths are padded to one of eight per octave, to limit the number of shapes.
        num_workers: processes that collate batches ahead, for rows that are slow to make, such as images to decode.
            With 0, the next window is collated while the device computes. A worker that dies is replaced. Must be 0 for
            a stream.
        preprocessing_num_workers: processes that tokenize raw text before training. None: the main process. A stream is
            tokenized as it arrives, in the main process. Tokenized rows are stored in the cache of `datasets`, if they
            come from a file, and found again by later runs.
        sharding: "fsdp2" shards weights, gradients and optimizer state over the processes, for models that do not fit
            on one device. The model stays sharded after the run; the saved files are whole. "off": each process holds
            whole copies. None: as the config file of `accelerate launch` says.
        sync: with sharding, the passes of an update that sync gradients. "each": gradients stay sharded. "last": only
            the last pass, which communicates less, but each process holds whole gradients until then.
        lora: adapters to train instead of the model's own weights. True: LoRA of rank 16, alpha 32, without dropout, on
            all linear layers. A dict: arguments of `peft.LoraConfig` that replace these. Or any `peft.PeftConfig`. The
            head of a classifier is trained in full. PEFT changes the model that is passed in: `result.model` is the
            PEFT model, and `result.model.unload()` takes the adapters out.
        tokenizer: tokenizes raw text and defines the padding. Saved with the model.
        data_collator: function from a list of rows to a batch of tensors, with rows as the first dimension. None pads
            columns along the tokens.
        loss_fn: `loss_fn(outputs, targets)` for tuples, `loss_fn(outputs, batch)` for dicts. Returns a mean, or a dict
            of named means, which are logged separately and summed for training. The model then gets no labels, except
            an encoder-decoder, which makes its decoder's inputs from them. None: the model's own loss.
        class_weights: weights of the classes in the model's own loss, for sequence, token and image classification.
            "balanced": n / (classes × n_c), with n_c of the n labels of the training rows in class c. Or one positive
            number per class, in the order of the class numbers. The loss of an update is Σ w·ℓ / Σ w over all its
            labels, as `torch.nn.CrossEntropyLoss(weight=…)` of one batch. The validation loss is weighted, too.
        label_smoothing: ε of `torch.nn.CrossEntropyLoss(label_smoothing=ε)`, from 0 to below 1, for the model's own
            loss if that is a cross entropy: of classifiers, and of causal, masked and encoder-decoder language models.
            The validation loss is smoothed, too.
        loss_over: "window" for a `loss_fn` that reads all rows of an update together, as contrastive and ranking losses
            do. `loss_fn(inputs, batch)` is then called once per update, with what `loss_inputs` returns for all rows on
            all processes in the update's order, and with the columns of at most two dimensions whose rows all have the
            same shape. It returns a number or a dict of numbers, and may read parameters. Each micro-batch runs forward
            twice.
        loss_inputs: with `loss_over="window"`, a function of a micro-batch's outputs and batch that returns what
            `loss_fn` reads of its rows: a tensor or a dict of tensors, rows first. None: the model's outputs.
        router_balance: "window" computes the load-balancing loss of a mixture of experts over all tokens of an update,
            in two forward passes; "micro_batch" takes the mean over micro-batches, which only approximates it.
        reduction: "sum" if the loss is a sum over loss items, which ftaccum divides by their number; otherwise "mean".
        count_items: function from a batch to its number of loss items, or to a dict of these numbers by loss term. None
            measures it; for a sum, it counts labels that are not ignored (for non-integer targets, elements).
        compute_metrics: function from `EvalPrediction` to a dict, as for `Trainer`: `predictions` are the logits, or a
            tuple if the model returns several outputs, such as start and end logits; `label_ids` are the labels. Both
            have all validation rows in order, padded with -100. Or an `evaluate` module, such as `ftaccum.Accuracy()`,
            which gets the arg-max of the logits and the labels that are not ignored.
        preprocess_logits_for_metrics: function `f(logits, labels)` that is called on each evaluated batch on the
            device, as for `Trainer`. Returns a tensor, or a nested tuple, list or dict of tensors, rows first; joined
            over all batches, these are the `predictions` that `compute_metrics` gets. A language model needs it to
            keep token ids (`lambda logits, labels: logits.argmax(-1)`) instead of logits for the whole vocabulary.
            `compute_metrics` must be a function; an `evaluate` module gets classes without it.
        generation_kwargs: arguments of `model.generate`, such as {"max_new_tokens": 64}. An evaluation then generates
            a text for each row, greedily by default, and the `predictions` are its token ids, padded with -100. A
            decoder-only model continues the tokens before a row's first label. None: the predictions are logits.
        callbacks: `transformers.TrainerCallback` objects, called as `Trainer` calls them, except that `global_step`
            counts skipped updates too. They may stop the run, and request an evaluation, a checkpoint or a log entry.
            If one raises, the run ends with the current update and a checkpoint. `ftaccum.callbacks` has some.
        evaluate_every: how often to evaluate: an integer is a number of updates; a float above 0 and up to 1, or text
            such as "25%", is a share of the rows of an epoch, after the first update that completes it. None: after
            each epoch. The end of training is always evaluated.
        eval_batch_size: rows per batch of an evaluation on one process. This is an upper limit, as `batch_size` is for
            training; `max_tokens`, if set, limits batches too. None: as many as `batch_size`. The results do not depend
            on it, except for a loss that compares the rows of a batch.
        metric_for_best: name of the metric, among those that `compute_metrics` returns, that decides which evaluation
            is the best. None (or "val_loss"): the validation loss. NaN and infinity are never the best.
        greater_is_better: whether greater values of `metric_for_best` are better. None: decided by its name, if that
            contains a known word (accuracy, f1, bleu, …: greater; loss, mse, perplexity, …: lower).
        early_stopping_patience: stop after this many evaluations without a better one. None: never.
        early_stopping_min_delta: the smallest improvement, over the best value so far, that early stopping counts as
            better.
        restore_best_weights: end with the weights of the best evaluation.
        random_seed: seed of the hold-out, the row order and dropout. The run restores the global random generators.
        on_inexact: what to do if a check before training finds that accumulating the loss only approximates one large
            batch (a loss that compares rows, batch norm, a router's balance): "error", "warn" or "ignore".
        audit: compare the gradient of some updates with the gradient of one batch of the same rows, without dropout.
            True: updates 1, 4, 16 and 64, then up to 1% of the training time. An integer: the number of updates
            between two audits. `on_inexact` determines what happens if a gradient is not exact.
        noise_scale: measure in some updates how much of the gradient is noise (docs/noise_scale.md), from random halves
            of their rows; the update stays the same but for rounding. An integer: the number of updates from one
            measurement to the next. "auto": 10, but none in a run of fewer than 80 updates or with `deterministic`.
            False: never.
        self_check_cache: keep the verdict of the check before training, to only confirm it later; or a folder for it.
        on_nonfinite: what to do with an update if its gradient, or its loss in any micro-batch on any process, is not
            finite. "skip": leave weights, buffers, optimizer and schedule unchanged, report which rows have a
            non-finite loss of their own, and continue. "error": end the run; only an overflow that the gradient scaler
            handles is still skipped.
        nonfinite_patience: end the run after this many consecutive skipped updates. None: never. (25 skips lower the
            gradient scale of fp16 from 2^16 to 2^-9.)
        deterministic: use only deterministic algorithms.
        output_dir: folder for `run.json`, `ledger.jsonl`, `result.json`, `model/` and `checkpoints/`. If it becomes
            unwritable, the run warns and continues. None saves nothing; see `Result.save_model`.
        save: files of the trained model in `model/`, if it has adapters. "adapter": only the adapters, to load with the
            base model. "merged": a plain model that loads without PEFT. "both": the plain model, and the adapters in
            `adapter/`. Merging works on a copy on the host; the model in memory keeps its adapters.
        checkpoint_every: updates between two checkpoints, or a time such as "90s", "15min" or "2h". None saves only at
            the ends of epochs and after evaluations that are the best so far, which are saved in any case. Checkpoints
            are written in the background.
        keep_checkpoints: number of newest checkpoints to keep during the run, besides the one of the best evaluation.
            Once the run has finished, it keeps the newest, so that it can be extended. 0 keeps one during the run, and
            none once it has finished.
        resume: "auto" resumes from the newest sound checkpoint in `output_dir`, or starts a new run if there is none.
            The folder of a checkpoint or of a run resumes from it. None (or "off") starts a new run. With the same
            settings, the run ends as if it had never stopped, to the last bit. On a different number of processes or
            with another `batch_size`, it continues after the rows that are done.
        allow_changed: names of settings (`learning_rate`, `n_epochs`, `effective_batch_size`, `train_data`, …) that may
            differ from those of the resumed run. Any other difference is an error.
        push_to_hub: repository on the Hugging Face Hub, "user/name", to upload the folder `model` in `output_dir` to at
            the end. A new repository is private. Login, network and permission are checked before the data are read. If
            the upload fails, the run warns, and the model is still in `output_dir`.
        log_every: updates between two entries for the trackers. An entry has the mean loss over the loss items of the
            updates since the last one, and their last and largest gradient norm. The ledger and the result have every
            update.
        log_with: "tensorboard", "wandb", "mlflow", "trackio", another tracker that Accelerate supports, "all" for those
            that are installed, a tracker object, or a list of these. Each tracker runs in its own thread, and the run
            continues if it raises or hangs. Their files are in `output_dir`. Without a login, W&B works offline.
        use_wandb: short for `log_with="wandb"`.
        progress: show progress bars in a terminal or a notebook.
        verbosity: "quiet" prints only warnings: no sizes, no tables, no progress bar and no messages. "normal" prints
            them. "debug" also logs how the loss was measured, how each window was cut, each audit and each checkpoint.

    Returns:
        The losses, norms, rates and metrics of the run; see `Result`.

    Raises:
        SettingsError: if arguments are invalid. One message lists them all, before anything is loaded.
        CheckpointError: if there is no checkpoint to resume from, or only one of a run with different settings; or if
            `resume` is "auto" and the run in `output_dir` has finished and kept no checkpoint.
        KeyboardInterrupt: after Ctrl-C, once the current update is finished and saved. In a notebook or at a prompt,
            the call returns the result so far instead, and its `interrupted` is True.
        Preempted: after SIGTERM or SIGUSR1, once the current update is finished and saved. A `SystemExit` with status
            75.
        InexactLossError: if `on_inexact` is "error" and accumulating the loss is not exact. If an audit finds this
            during training, the checkpoint and the model are saved first, and the message names them.
        DataError: if the data cannot be used for training; names the row, if possible.
        CallbackError: if a callback raises an error. The checkpoint is saved first.
        MetricsError: if `compute_metrics` or `preprocess_logits_for_metrics` raises and there are several processes. A
            single process raises the original error.
        LostProcessError: if another process of the run has died or does not respond.
        DivergedError: if an update is not finite and `on_nonfinite` is "error", or `nonfinite_patience` is exhausted;
            names the rows at fault.
        torch.OutOfMemoryError: if a single row does not fit in memory. If several rows do not fit, the window runs
            again in smaller micro-batches, with the same update.

    Warns:
        InexactLossWarning: if accumulating the loss only approximates one large batch; gives the size of the error,
            its likely cause and the remedy.
        PaddingWarning: if a user's loss depends on padding.
        LossScaleWarning: if `loss_fn` returns 1/k of the model's own loss for a whole number k, as if it divided by the
            accumulation steps.
        OutputWarning: if a file could not be written, or a tracker failed.

    Example:
        >>> result = test_fine_tuning(model, train_data=rows, batch_size=4, gradient_accumulation_steps=64)
        >>> result["final_loss"], result.grad_norm_history[:3]
    """
    return run_training(RunConfig.from_arguments(locals()), returns_interrupted=is_interactive())


# Otherwise pytest would collect this function from test modules that import it.
test_fine_tuning.__test__ = False  # type: ignore[attr-defined]
