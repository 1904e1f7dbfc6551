"""`test_fine_tuning`: the one place where the parts meet."""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_model
from torch import nn
from torch.optim import Optimizer

from .adapting import Adaptation
from .assembly import Assembly, assemble
from .borrowing import borrowed, compiled
from .calibration import Calibration, NoCalibration
from .cutting import GUESSED_COSTS, Caps, Cutter, PassCosts
from .data import Collator, Feed, mean_length
from .errors import SettingsError
from .evaluation import ComputeMetrics, Evaluation, NoEvaluation
from .history import EpochEntry, Ledger, Result, Work
from .loop import Outcome, TrainingLoop
from .memory import Agreement, agreed_by
from .objective import CountItems, LossFn
from .optim import OptimizerFactory, make_optimizer, make_schedule, rates_put_back
from .parts import Parts, check_parts
from .physical_batch import largest_batch
from .planning import Batching, Plan, batching_of
from .recording import Recorder, tracking
from .screen import Screen
from .selection import BestEpoch
from .session import session
from .settings import Recipe, Runtime, checked


def test_fine_tuning(
    model: nn.Module,
    config: Any = None,
    train_data: Any = None,
    val_data: Any = None,
    *,
    validation_split: float = 0.1,
    n_epochs: int = 3,
    batch_size: int | str = 4,
    gradient_accumulation_steps: int = 1,
    effective_batch_size: int | None = None,
    tokens_per_update: int | None = None,
    max_tokens: int | None = None,
    planner: bool = True,
    planner_costs: Sequence[float] | None = None,
    padding_free: bool = False,
    learning_rate: float = 5e-5,
    weight_decay: float = 0.01,
    optimizer: OptimizerFactory | Optimizer | None = None,
    lr_scheduler: str = "linear",
    warmup_steps: int = 0,
    warmup_ratio: float = 0.0,
    gradient_clip_norm: float | None = 1.0,
    use_amp: bool = False,
    mixed_precision: str | None = None,
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
    deterministic: bool = False,
    output_dir: str | None = None,
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
        train_data: a `datasets.Dataset` (tokenised, or raw text with `tokenizer`), a list of dicts, a list of 1-D
            tensors of token ids (next-token loss), or a torch `Dataset` of dicts or, with `loss_fn`, of
            `(inputs, targets)` tuples. None: synthetic token ids below `config.vocab_size`.
        val_data: the same for validation.
        validation_split: share of the training rows held out where `val_data` is None; 0 for none.
        n_epochs: passes over the training rows.
        batch_size: rows of a micro-batch on one process; at most as many, where the planner finds fewer cheaper.
            "auto": the most of the longest rows that fit in memory, found by trying before the first update; give
            `effective_batch_size` or `tokens_per_update` with it.
        gradient_accumulation_steps: k, micro-batches per update on each process. 1 leaves the size of an update to
            the next two, where one is given.
        effective_batch_size: rows per update over all processes; k = ⌈it / (batch_size × processes)⌉, and a last
            micro-batch may be short.
        tokens_per_update: tokens per update over all processes; divided by the mean row length it gives the rows.
        max_tokens: the most positions of a micro-batch, padding included. Where given, micro-batches are cut by these
            and may have any number of rows; `batch_size` then only helps to say how large an update is.
        planner: whether each window, once its rows are drawn, is cut where it costs least. False: into equal slices
            in the order of arrival. Either way the update is the same.
        planner_costs: what a forward and backward pass costs: a number per pass, per padded token, per row of squared
            width, in any unit. None: a guess, and from the tenth update on what passes were seen to cost
            (`Result.planner_costs`; with `deterministic` the guess is kept, for runs to be cut alike).
        padding_free: lay the rows of a micro-batch one behind the other instead of padding them. For causal language
            models that keep such rows apart by `position_ids`, which is tried before training.
        learning_rate: the peak rate.
        weight_decay: decoupled; biases and norms get none.
        optimizer: a function of the parameter groups (each with `lr` and `weight_decay`), or an instance, which
            keeps its own. None: AdamW.
        lr_scheduler: a name that Transformers' `get_scheduler` knows; it steps once a successful update.
        warmup_steps: updates of warm-up.
        warmup_ratio: the same as a share of all updates.
        gradient_clip_norm: largest total norm of an update's gradient; None for no clipping (norms are recorded).
        use_amp: autocast to bf16 where the device supports it, else to fp16 with a gradient scaler.
        mixed_precision: "no", "bf16" or "fp16"; None for what `accelerate launch` was told, else "no".
        gradient_checkpointing: recompute activations in the backward pass (Transformers' models).
        compile: `torch.compile` the model. Widths are padded to one of eight an octave, so that few are met.
        num_workers: processes that collate ahead, for rows that take long to make (images to decode). Without, the
            next window is collated while the device computes.
        tokenizer: tokenises raw text, and says how to pad. Saved with the model.
        data_collator: a list of rows → a batch of tensors, rows first. None: columns are padded.
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
        deterministic: deterministic algorithms only.
        output_dir: folder for `ledger.jsonl`, `result.json` and `model/`.
        log_with: an Accelerate tracker, or its name.
        use_wandb: short for `log_with="wandb"`.
        progress: show a progress bar.

    Returns:
        The losses, norms, rates and metrics of the run; see `Result`.

    Raises:
        SettingsError: arguments that cannot be used, all in one message, before anything is loaded.
        DataError: data that cannot be trained on, with the row where there is one.
        torch.OutOfMemoryError: where memory runs out for a single row. For more rows, the window is run again in
            smaller micro-batches, with the same update.

    Warns:
        InexactLossWarning: where the loss is not a mean over countable items.

    Example:
        >>> result = test_fine_tuning(model, train_data=rows, batch_size=4, gradient_accumulation_steps=64)
        >>> result["final_loss"], result.grad_norm_history[:3]
    """
    given = dict(locals())
    recipe, runtime = checked(given)
    parts = Parts(**{f.name: given[f.name] for f in fields(Parts)})
    check_parts(parts, recipe)
    with session(runtime, recipe.random_seed) as accelerator:
        return _run(parts, recipe, runtime, accelerator)


# pytest collects whatever is named `test_*` where a user imports it.
test_fine_tuning.__test__ = False  # type: ignore[attr-defined]


def _run(parts: Parts, recipe: Recipe, runtime: Runtime, accelerator: Accelerator) -> Result:
    """One run. The model is left trained, in the mode and without the wrappers that it came with."""
    model, folder = parts.model, _made(runtime.output_dir)
    screen = Screen(accelerator.is_main_process, runtime.progress)
    _check_precision(model, accelerator)
    optimizer = make_optimizer(model, parts.optimizer, recipe.learning_rate, recipe.weight_decay)
    if not getattr(model, "hf_device_map", None):  # a model that was spread over devices stays so
        model.to(accelerator.device)
    with ExitStack() as stack:
        stack.enter_context(borrowed(model, gradient_checkpointing=runtime.gradient_checkpointing))
        stack.enter_context(rates_put_back(optimizer))
        agreement = stack.enter_context(agreed_by(accelerator))
        assembly, plan = _planned(parts, recipe, runtime, accelerator, agreement)
        warmup = plan.warmup_updates(recipe.warmup_steps, recipe.warmup_ratio)
        screen.banner(plan, assembly.notes(), warmup, accelerator.mixed_precision, accelerator.device.type)

        schedule = make_schedule(recipe.lr_scheduler, optimizer, warmup, plan.n_windows)
        if runtime.compile:
            stack.enter_context(compiled(model))
        wrapped, prepared = accelerator.prepare(model, optimizer)
        clip = math.inf if recipe.gradient_clip_norm is None else recipe.gradient_clip_norm
        calibration = _calibration(runtime, accelerator)
        feed = Feed(plan, assembly.train, _cutter(runtime, plan.batching), accelerator.process_index)
        adaptation = Adaptation(feed, agreement, calibration, screen.note)
        loop = TrainingLoop(accelerator, wrapped, assembly.objective, prepared, schedule, clip, agreement, calibration)
        ledger = Ledger(folder / "ledger.jsonl" if folder and accelerator.is_main_process else None)
        stack.enter_context(tracking(accelerator, vars(recipe) | vars(runtime), plan.batching))

        started, work = time.perf_counter(), Work()
        evaluate = _evaluation(assembly, parts.compute_metrics, accelerator, replace(feed.cutter, packed=False))
        best = BestEpoch(recipe.early_stopping_patience, recipe.restore_best_weights)
        # Before the first update also to have a metric that cannot be computed fail now and not after an epoch.
        ledger.initial_val_loss, metrics = evaluate(model)
        screen.epoch(EpochEntry(-1, math.nan, ledger.initial_val_loss, metrics), plan.n_epochs)
        recorder = Recorder(accelerator, ledger, stack.enter_context(screen.bar(plan.n_windows)), plan.batching, work)

        def on_window(outcome: Outcome) -> None:
            recorder.window(outcome)
            adaptation.window_done()

        for epoch in range(plan.n_epochs):
            with work.timed():
                loop.train(feed.epoch(epoch), adaptation.smaller, on_window)
            val_loss, metrics = evaluate(model)
            screen.epoch(recorder.epoch(val_loss, metrics), plan.n_epochs)
            if best.ends_after(val_loss, model):
                screen.note(f"Stopped early: no better validation loss in {recipe.early_stopping_patience} epochs.")
                break
        if best.restore(model):
            screen.note(f"Restored the weights of the epoch with validation loss {best.loss:.4f}.")
        result = Result.of(
            ledger,
            plan.batching,
            work=_over_processes(work, accelerator),
            training_time=time.perf_counter() - started,
            planner_costs=None if feed.cutter.costs is None else list(astuple(feed.cutter.costs)),
            out_of_memory=adaptation.headroom.failures,
            amp_enabled=accelerator.mixed_precision != "no",
            final_loss_scale=None if accelerator.scaler is None else accelerator.scaler.get_scale(),
            output_dir=runtime.output_dir,
        )
    if folder and accelerator.is_main_process:
        _save(result, model, parts.tokenizer, folder)
    accelerator.wait_for_everyone()
    screen.result(result)
    return result


def _planned(
    parts: Parts, recipe: Recipe, runtime: Runtime, accelerator: Accelerator, agreement: Agreement
) -> tuple[Assembly, Plan]:
    n_processes = accelerator.num_processes
    if not recipe.tokens_per_update and runtime.batch_size != "auto":
        batching_of(recipe, runtime, n_processes)  # sizes that disagree are told before the data are looked at
    assembly = assemble(parts, recipe, runtime, accelerator)
    length = mean_length(assembly.train_rows) if recipe.tokens_per_update else None
    if runtime.batch_size == "auto":
        rows = batching_of(recipe, replace(runtime, batch_size=1), n_processes, length).effective_batch_size
        at_most = math.ceil(rows / n_processes)
        size = largest_batch(parts.model, assembly.objective, assembly.train, accelerator, agreement, at_most)
        runtime = replace(runtime, batch_size=size)
    batching = batching_of(recipe, runtime, n_processes, length)
    n_validation = 0 if assembly.val_rows is None else len(assembly.val_rows)
    return assembly, Plan(len(assembly.train_rows), recipe.n_epochs, batching, recipe.random_seed, n_validation)


def _cutter(runtime: Runtime, batching: Batching) -> Cutter:
    rows = batching.batch_size if runtime.max_tokens is None else None
    given = GUESSED_COSTS if runtime.planner_costs is None else PassCosts(*runtime.planner_costs)
    return Cutter(
        Caps(rows, runtime.max_tokens), given if runtime.planner else None, batching.num_processes, runtime.padding_free
    )


def _calibration(runtime: Runtime, accelerator: Accelerator) -> NoCalibration:
    measures = runtime.planner and runtime.planner_costs is None and not runtime.deterministic
    return Calibration(accelerator) if measures and accelerator.device.type in ("cpu", "cuda") else NoCalibration()


def _check_precision(model: nn.Module, accelerator: Accelerator) -> None:
    if accelerator.mixed_precision == "fp16" and any(p.dtype == torch.float16 for p in model.parameters()):
        raise SettingsError(
            [
                "`mixed_precision` is 'fp16', but the model's weights are float16, which gradients cannot be unscaled "
                "into. Load the model in float32 (`dtype=torch.float32`)."
            ]
        )


def _evaluation(
    assembly: Assembly, compute_metrics: ComputeMetrics | None, accelerator: Accelerator, cutter: Cutter
) -> Evaluation | NoEvaluation:
    if assembly.val is None or assembly.val_rows is None:
        return NoEvaluation()
    return Evaluation(
        accelerator,
        assembly.objective,
        assembly.val,
        len(assembly.val_rows),
        cutter,
        compute_metrics,
        assembly.ignore_index,
    )


def _over_processes(work: Work, accelerator: Accelerator) -> Work:
    counts = torch.tensor([work.rows, work.tokens, work.positions, work.passes], device=accelerator.device)
    rows, tokens, positions, passes = accelerator.reduce(counts, "sum").tolist()
    return Work(rows, tokens, positions, passes, work.seconds)


def _made(output_dir: str | None) -> Path | None:
    if output_dir is None:
        return None
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            [f"`output_dir` {output_dir!r} cannot be made: {error}. Name a folder that can be written to."]
        ) from error
    return Path(output_dir)


def _save(result: Result, model: Any, tokenizer: Any, folder: Path) -> None:
    """`result.json`, and in `model/` the model, and its tokenizer, as `from_pretrained` and `pipeline` read them."""
    result.save(folder / "result.json")
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder / "model")
    else:
        (folder / "model").mkdir(exist_ok=True)
        save_model(model, str(folder / "model" / "model.safetensors"))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "model")
