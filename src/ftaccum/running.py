"""One run: the one place where the parts meet."""

import math
import time
from contextlib import ExitStack
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_model
from torch import nn

from .adapting import Adaptation
from .arranging import cutter_of, how_cut, planned
from .assembly import Assembly
from .borrowing import borrowed, compiled
from .calibration import Calibration, NoCalibration, PassTimer
from .cutting import Cutter
from .data import Feed
from .errors import DataError, SettingsError, StreamError
from .evaluation import ComputeMetrics, Evaluation, NoEvaluation
from .history import EpochEntry, Ledger, Result, Work
from .loop import Outcome, TrainingLoop
from .memory import agreed_by
from .optim import make_optimizer, make_schedule, rates_put_back
from .parts import Parts
from .planning import Batching
from .reading import opened
from .recording import Recorder, tracking
from .selection import BestEpoch
from .settings import Recipe, Runtime
from .watching import Milestones, Watcher
from .wide_gradients import window_gradients


def run(parts: Parts, recipe: Recipe, runtime: Runtime, accelerator: Accelerator, watcher: Watcher) -> Result:
    """One run. The model is left trained, in the mode and without the wrappers that it came with."""
    model, folder = parts.model, _made(runtime.output_dir)
    screen = watcher.screen(accelerator.is_main_process, runtime.progress)
    _check_precision(model, runtime, accelerator)
    optimizer = make_optimizer(model, parts.optimizer, recipe.learning_rate, recipe.weight_decay)
    if not getattr(model, "hf_device_map", None):  # a model that was spread over devices stays so
        model.to(accelerator.device)
    with ExitStack() as stack:
        stack.enter_context(borrowed(model, gradient_checkpointing=runtime.gradient_checkpointing))
        stack.enter_context(rates_put_back(optimizer))
        agreement = stack.enter_context(agreed_by(accelerator))
        stream = stack.enter_context(opened(parts.train_data, recipe.random_seed, accelerator, agreement))
        assembly, plan, runtime = planned(parts, recipe, runtime, accelerator, agreement, stream)
        warmup = plan.warmup_updates(recipe.warmup_steps, recipe.warmup_ratio)
        notes = [*assembly.notes(), how_cut(runtime, plan.batching, assembly.train.knows_lengths)]
        screen.banner(plan, notes, warmup, accelerator.mixed_precision, accelerator.device.type)

        schedule = make_schedule(recipe.lr_scheduler, optimizer, warmup, plan.n_windows)
        if runtime.compile:
            stack.enter_context(compiled(model))
        gradients = window_gradients(optimizer, in_float32=runtime.accumulate_in_fp32)
        wrapped, prepared = gradients.prepare(accelerator, model)
        calibration = _calibration(runtime, accelerator)
        feed = Feed(plan, assembly.train, cutter_of(runtime, plan.batching), accelerator.process_index)
        adaptation = Adaptation(feed, agreement, calibration, screen.note)
        loop = TrainingLoop(
            accelerator, wrapped, assembly.objective, prepared, schedule, gradients, plan.rate_factor,
            max_grad_norm=recipe.gradient_clip_norm or math.inf, agreement=agreement, calibration=calibration,
        )  # fmt: skip
        ledger = Ledger(folder / "ledger.jsonl" if folder and accelerator.is_main_process else None)
        stack.enter_context(tracking(accelerator, vars(recipe) | vars(runtime), plan.batching))

        started, work = time.perf_counter(), Work()
        evaluate = _evaluation(assembly, parts.compute_metrics, accelerator, replace(feed.cutter, packed=False))
        best = BestEpoch(recipe.early_stopping_patience, recipe.restore_best_weights)
        # Before the first update also to have a metric that cannot be computed fail now and not after an epoch.
        ledger.initial_val_loss, metrics = evaluate(model)
        screen.epoch(EpochEntry(-1, math.nan, ledger.initial_val_loss, metrics), plan.n_epochs)
        recorder = Recorder(accelerator, ledger, stack.enter_context(screen.bar(plan.n_windows)), plan.batching, work)

        def validate() -> float | None:
            recorder.drain()  # the run may end here, and then all of its updates are in the ledger
            return evaluate(model)[0]

        milestones = Milestones(watcher, plan, validate, work)

        def on_window(outcome: Outcome) -> None:
            recorder.window(outcome)
            adaptation.window_done()
            milestones.window_done()

        for epoch in plan.epochs:
            with work.timed(), recorder.kept_on(DataError if agreement.alone else StreamError):
                loop.train(feed.epoch(epoch), adaptation.smaller, on_window)
            entry = recorder.epoch(*evaluate(model))
            screen.epoch(entry, plan.n_epochs)
            milestones.epoch_done(entry)
            if best.ends_after(entry.val_loss, model, updated=plan.n_windows_of(epoch) > 0):
                screen.note(f"Stopped early: no better validation loss in {recipe.early_stopping_patience} epochs.")
                break
        else:
            if shortfall := plan.shortfall():
                screen.note(shortfall)
        if best.restore(model):
            screen.note(f"Restored the weights of the epoch with validation loss {best.loss:.4f}.")
        training_time = time.perf_counter() - started
        result = _result(
            ledger, plan.batching, _over_processes(work, accelerator), training_time, adaptation, accelerator
        )
    if folder and accelerator.is_main_process:
        result.save(folder / "result.json")
        if watcher.saves_model:
            _save(model, parts.tokenizer, folder / "model")
    accelerator.wait_for_everyone()
    screen.result(result)
    return result


def _result(
    ledger: Ledger,
    batching: Batching,
    work: Work,
    training_time: float,
    adaptation: Adaptation,
    accelerator: Accelerator,
) -> Result:
    costs, scaler = adaptation.feed.cutter.costs, accelerator.scaler
    return Result.of(
        ledger,
        batching,
        work=work,
        training_time=training_time,
        planner_costs=None if costs is None else list(astuple(costs)),
        out_of_memory=adaptation.headroom.failures,
        amp_enabled=accelerator.mixed_precision != "no",
        final_loss_scale=None if scaler is None else scaler.get_scale(),
        output_dir=accelerator.project_dir,
    )


def _calibration(runtime: Runtime, accelerator: Accelerator) -> PassTimer:
    measures = runtime.planner and runtime.planner_costs is None and not runtime.deterministic
    return Calibration(accelerator) if measures and accelerator.device.type in ("cpu", "cuda") else NoCalibration()


def _check_precision(model: nn.Module, runtime: Runtime, accelerator: Accelerator) -> None:
    if runtime.accumulate_in_fp32 or accelerator.mixed_precision != "fp16":
        return
    if any(p.dtype == torch.float16 for p in model.parameters()):
        raise SettingsError(
            [
                "`mixed_precision` is 'fp16', but the model's weights are float16, which gradients cannot be unscaled "
                "into. Load the model in float32 (`dtype=torch.float32`), or use `accumulate_in_fp32`."
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
        n_rows=len(assembly.val_rows),
        cutter=cutter,
        compute_metrics=compute_metrics,
        ignore_index=assembly.ignore_index,
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
    except (OSError, ValueError) as error:  # ValueError: a name that the file system cannot spell
        raise SettingsError(
            [f"`output_dir` {output_dir!r} cannot be made: {error}. Name a folder that can be written to."]
        ) from error
    return Path(output_dir)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """The model, and its tokenizer, as `from_pretrained` and `pipeline` read them."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        folder.mkdir(exist_ok=True)
        save_model(model, str(folder / "model.safetensors"))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
