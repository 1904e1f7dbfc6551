"""`test_fine_tuning`: what users call."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .data.collator import Collator
from .fields import DefaultFloat, Pairs
from .objective.forward import LossFn
from .objective.item_counts import CountItems
from .tracking.result import Result
from .training.config import RunConfig
from .training.evaluation import ComputeMetrics
from .training.optimizer import OptimizerFactory
from .training.run import run_training


def test_fine_tuning(
    model: nn.Module,
    config: Any = None,
    train_data: Any = None,
    val_data: Any = None,
    *,
    validation_split: float = 0.1,
    text_columns: str | Sequence[str] | None = None,
    add_eos_token: bool = True,
    n_epochs: int = 3,
    max_updates: int | None = None,
    batch_size: int | str = 4,
    gradient_accumulation_steps: int | str | Pairs = 1,
    effective_batch_size: int | None = None,
    tokens_per_update: int | None = None,
    remainder: str = "flush",
    max_tokens: int | None = None,
    planner: bool = True,
    planner_costs: Sequence[float] | None = None,
    padding_free: bool = False,
    learning_rate: float = DefaultFloat(5e-5),
    learning_rate_scaling: str = "none",
    weight_decay: float = DefaultFloat(0.01),
    optimizer: OptimizerFactory | Optimizer | None = None,
    lr_scheduler: str = "linear",
    warmup_steps: int = 0,
    warmup_ratio: float = 0.0,
    gradient_clip_norm: float | None = 1.0,
    use_amp: bool = False,
    mixed_precision: str | None = None,
    accumulate_in_fp32: bool = False,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    num_workers: int = 0,
    tokenizer: Any = None,
    data_collator: Collator | None = None,
    loss_fn: LossFn | None = None,
    reduction: str = "mean",
    count_items: CountItems | None = None,
    compute_metrics: ComputeMetrics | None = None,
    early_stopping_patience: int | None = None,
    restore_best_weights: bool = False,
    random_seed: int = 42,
    on_inexact: str = "warn",
    audit: bool | int = True,
    on_nonfinite: str = "skip",
    nonfinite_patience: int | None = 25,
    deterministic: bool = False,
    output_dir: str | None = None,
    checkpoint_every: int | str | None = "15min",
    keep_checkpoints: int = 2,
    resume: str | None = None,
    allow_changed: str | Sequence[str] = (),
    log_with: Any = None,
    use_wandb: bool = False,
    progress: bool = True,
) -> Result:
    """Fine-tunes a model with gradient accumulation that is exactly a large batch.

    For every update the gradient, before clipping, is that of the mean loss over all loss items (tokens, rows, …) of
    the effective batch, on all processes, however it is cut into micro-batches. The model is trained in place.

    Args:
        model: a `PreTrainedModel`, a PEFT model, or any module.
        config: the model's configuration, or any object with `vocab_size` and `pad_token_id`; `model.config` where
            None.
        train_data: a `datasets.Dataset` (tokenised, or raw text with `tokenizer`), a list of dicts, a pandas
            DataFrame, a dict of columns, a list of 1-D tensors of token ids (next-token loss), or a torch `Dataset` of
            dicts or, with `loss_fn`, of `(inputs, targets)` tuples. A stream of such rows (`IterableDataset` of
            `datasets` or torch), with `max_updates`: windows form in its order, the main process reads it for all.
            None: synthetic token ids below `config.vocab_size`.
        val_data: the same for validation, but no stream.
        validation_split: share of the training rows held out where `val_data` is None; 0 for none. From a stream none
            can be: give `val_data`, or 0.
        text_columns: the column of raw text to train on, or two columns for pairs of texts, such as
            ("premise", "hypothesis"). None takes the only column of text besides the labels (`label` or `labels`), and
            asks for a name if there are several.
        add_eos_token: end each text of a causal LM in the tokenizer's end-of-text token, so that the model learns to
            stop. Texts that already end in it, or that are cut, get none. False leaves them as the tokenizer makes
            them.
        n_epochs: passes over the training rows; of a stream, at most so many.
        max_updates: updates (skipped ones included) after which training ends, if the epochs have not ended it before;
            the schedule then counts on so many. The last epoch is evaluated where it ends.
        batch_size: rows of a micro-batch on one process; at most as many, where the planner finds fewer cheaper.
            "auto": the most of the longest rows that fit in memory, found by trying before the first update; give
            `effective_batch_size` or `tokens_per_update` with it.
        gradient_accumulation_steps: k, micro-batches per update on each process; or pairs (from_update, k), such as
            [(0, 2), (100, 8)] or the text "0:2,100:8", for updates that are four times as large from the 101st on.
            1 leaves the size of an update to the next two, where one is given.
        effective_batch_size: rows per update over all processes; k = ⌈it / (batch_size × processes)⌉, and a last
            micro-batch may be short.
        tokens_per_update: tokens per update over all processes; divided by the mean row length it gives the rows.
            (Of a stream, that of the first 256 rows.)
        remainder: what happens to the rows that are left of an epoch, fewer than an update wants. "flush": they make an
            update of their own. "carry": the first rows of the next epoch fill it up, and only at the end of training
            an update may be short. It counts to the epoch of its last row, and an epoch may have none.
        max_tokens: the most positions of a micro-batch, padding included. Where given, micro-batches are cut by these
            and may have any number of rows; `batch_size` then only helps to say how large an update is.
        planner: whether each window, once its rows are drawn, is cut where it costs least. False: into equal slices
            in the order of arrival. Either way the update is the same.
        planner_costs: what a forward and backward pass costs: a number per pass, per padded token, per row of squared
            width, in any unit. None: 64, 1 and 0.0005. On a device where a pass costs as much as many hundred tokens
            whatever is in it, larger costs per pass give fewer passes.
        padding_free: lay the rows of a micro-batch one behind the other instead of padding them. For causal language
            models that keep such rows apart by `position_ids`, which is tried before training.
        learning_rate: the peak rate.
        learning_rate_scaling: how the rate follows a k that changes: the schedule's is multiplied by 1 ("none"), by
            k/k0 ("linear": Goyal et al. 2017, arXiv:1706.02677, for SGD) or by √(k/k0) ("sqrt", for adaptive
            optimizers such as Adam: Malladi et al. 2022, arXiv:2205.10287), k0 being the first k.
        weight_decay: decoupled; biases and norms get none.
        optimizer: a function of the parameter groups (each with `lr` and `weight_decay`), or an instance. Where it is
            made with a rate or a decay (`lambda groups: SGD(groups, lr=0.1)`), that one counts and is printed; it is
            refused if it differs from a `learning_rate` or `weight_decay` that you give. None: AdamW.
        lr_scheduler: a name that Transformers' `get_scheduler` knows; it steps once a successful update.
        warmup_steps: updates of warm-up.
        warmup_ratio: the same as a share of all updates.
        gradient_clip_norm: largest total norm of an update's gradient; None for no clipping (norms are recorded).
        use_amp: autocast to bf16 where the device supports it, else to fp16 with a gradient scaler.
        mixed_precision: "no", "bf16" or "fp16"; None for what `accelerate launch` was told, else "no".
        accumulate_in_fp32: for weights in bf16 or fp16, whose gradients would be summed up in 16 bits: sum them up over
            passes and processes, measure and clip them in float32, and round them once, for the optimizer. Takes 2
            bytes more a trainable weight on one process, none on several. With wider weights it changes nothing.
        gradient_checkpointing: recompute activations in the backward pass (Transformers' models).
        compile: `torch.compile` the model. Widths are padded to one of eight an octave, so that few are met.
        num_workers: processes that collate ahead, for rows that take long to make (images to decode). Without, the
            next window is collated while the device computes. One that dies is replaced. None with a stream.
        tokenizer: tokenises raw text, and says how to pad. Saved with the model.
        data_collator: a list of rows → a batch of tensors, rows first. None: columns along the tokens are padded.
        loss_fn: `loss_fn(outputs, targets)` on tuples, `loss_fn(outputs, batch)` on dicts; gives a mean, or a dict of
            named means, each logged, their sum trained on. The model is not given the labels then (but for an
            encoder-decoder, which makes its decoder's inputs from them). None: the model's own loss.
        reduction: "sum" where the loss is Σ ℓ, which ftaccum divides by the number of items; else "mean".
        count_items: the number of loss items in a batch, or a dict of them by term. None: measured, or for a sum the
            labels that are not ignored (elements, where targets are not integers).
        compute_metrics: as `Trainer`'s, `EvalPrediction` → dict; or an `evaluate` module, such as
            `ftaccum.Accuracy()`, which gets the arg-max of the logits and the labels that are not ignored.
        early_stopping_patience: epochs without a better validation loss after which to stop.
        restore_best_weights: end with the weights of the epoch of best validation loss.
        random_seed: of hold-out, order of rows and dropout. The process's own generators are left as they were.
        on_inexact: "error", "warn" or "ignore": what to do where accumulating the loss is seen before training to be
            no more than near one large batch (rows compared with each other, batch norm, a router's balance).
        audit: whether to compare the gradient of some updates with that of one batch of the same rows, computed without
            dropout. True: updates 1, 4, 16 and 64, then for 1% of the time. A number: as many updates between two
            audits. A gradient that is not exact is treated as `on_inexact` says.
        on_nonfinite: what to do with an update whose loss, in any pass on any process, or whose gradient is not finite.
            "skip": leave weights, buffers, optimizer and schedule as they were, tell which rows have such a loss by
            themselves, and go on. "error": end the run there (an overflow that a gradient scaler takes care of is
            skipped all the same).
        nonfinite_patience: so many skipped updates in a row end the run; None: none do. (The scale of fp16 gradients
            falls from 2^16 to 2^-9 in 25.)
        deterministic: deterministic algorithms only.
        output_dir: folder for `ledger.jsonl`, `result.json`, `model/` and `checkpoints/`. Where it cannot be
            written to any more, the run goes on, and says so.
        checkpoint_every: updates between two checkpoints, or the time, such as "90s", "15min" or "2h"; None for none
            but those at the ends of epochs. They are written in the background.
        keep_checkpoints: how many of the newest ones stay, beside that of the epoch of best validation loss.
        resume: "auto" goes on from the newest sound checkpoint in `output_dir`, or starts where there is none; or the
            folder of a checkpoint, or of a run; None (or "off") starts anew. With the same settings, the run ends as
            if it had never stopped, to the last bit; on other processes or with another `batch_size` it goes on behind
            the rows that are done.
        allow_changed: names of settings (`learning_rate`, `n_epochs`, `effective_batch_size`, `train_data`, …) that may
            differ from those of the run that is gone on with. Any other difference is refused.
        log_with: an Accelerate tracker, or its name, or a list of those. Each is told from a thread of its own, and
            may raise or hang without harm to the run.
        use_wandb: short for `log_with="wandb"`.
        progress: show a progress bar.

    Returns:
        The losses, norms, rates and metrics of the run; see `Result`.

    Raises:
        SettingsError: arguments that cannot be used, all in one message, before anything is loaded.
        CheckpointError: where no checkpoint can be gone on from, or only one of a run with other settings.
        Preempted: where SIGTERM or SIGUSR1 came, after the update that was under way has been taken and saved. A
            `SystemExit` with status 75. (KeyboardInterrupt, where it was SIGINT.)
        InexactLossError: where `on_inexact` is "error", and accumulating the loss is not exact. If an audit finds that
            in the middle of a run, checkpoint and model are saved first, and the message names them.
        DataError: data that cannot be trained on, with the row where there is one.
        MetricsError: where `compute_metrics` raises, and there are several processes; one lets through what it raised.
        LostProcessError: where another process of the run has ended, or does not answer.
        DivergedError: where `on_nonfinite` is "error", or `nonfinite_patience` has run out, with the rows at fault.
        torch.OutOfMemoryError: where memory runs out for a single row. For more rows, the window is run again in
            smaller micro-batches, with the same update.

    Warns:
        InexactLossWarning: where accumulating the loss only approximates one large batch, with the figure, the likely
            cause and the remedy.
        PaddingWarning: where padding counts in a loss of the user's own.
        OutputWarning: where a file could not be written, or a tracker failed.

    Example:
        >>> result = test_fine_tuning(model, train_data=rows, batch_size=4, gradient_accumulation_steps=64)
        >>> result["final_loss"], result.grad_norm_history[:3]
    """
    return run_training(
        RunConfig.from_arguments(
            {
                "model": model,
                "config": config,
                "train_data": train_data,
                "val_data": val_data,
                "validation_split": validation_split,
                "text_columns": text_columns,
                "add_eos_token": add_eos_token,
                "n_epochs": n_epochs,
                "max_updates": max_updates,
                "batch_size": batch_size,
                "gradient_accumulation_steps": gradient_accumulation_steps,
                "effective_batch_size": effective_batch_size,
                "tokens_per_update": tokens_per_update,
                "remainder": remainder,
                "max_tokens": max_tokens,
                "planner": planner,
                "planner_costs": planner_costs,
                "padding_free": padding_free,
                "learning_rate": learning_rate,
                "learning_rate_scaling": learning_rate_scaling,
                "weight_decay": weight_decay,
                "optimizer": optimizer,
                "lr_scheduler": lr_scheduler,
                "warmup_steps": warmup_steps,
                "warmup_ratio": warmup_ratio,
                "gradient_clip_norm": gradient_clip_norm,
                "use_amp": use_amp,
                "mixed_precision": mixed_precision,
                "accumulate_in_fp32": accumulate_in_fp32,
                "gradient_checkpointing": gradient_checkpointing,
                "compile": compile,
                "num_workers": num_workers,
                "tokenizer": tokenizer,
                "data_collator": data_collator,
                "loss_fn": loss_fn,
                "reduction": reduction,
                "count_items": count_items,
                "compute_metrics": compute_metrics,
                "early_stopping_patience": early_stopping_patience,
                "restore_best_weights": restore_best_weights,
                "random_seed": random_seed,
                "on_inexact": on_inexact,
                "audit": audit,
                "on_nonfinite": on_nonfinite,
                "nonfinite_patience": nonfinite_patience,
                "deterministic": deterministic,
                "output_dir": output_dir,
                "checkpoint_every": checkpoint_every,
                "keep_checkpoints": keep_checkpoints,
                "resume": resume,
                "allow_changed": allow_changed,
                "log_with": log_with,
                "use_wandb": use_wandb,
                "progress": progress,
            }
        )
    )


# pytest collects whatever is named `test_*` where a user imports it.
test_fine_tuning.__test__ = False  # type: ignore[attr-defined]
