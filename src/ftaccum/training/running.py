"""One run: the one place where the parts meet."""

from contextlib import ExitStack
from dataclasses import astuple
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from ..checkpoint.compatibility import facts_of
from ..checkpoint.resume import Resumption
from ..data.reading import opened
from ..errors import SettingsError
from ..runtime.memory import agreed_by
from ..runtime.model_context import borrowed
from ..settings import Recipe, Runtime
from ..tracking.export import write_outputs
from ..tracking.result import Result
from ..tracking.throughput import Work
from .build_plan import how_cut, planned
from .build_run import Settled, training_of
from .callbacks import Watcher
from .components import Parts
from .optimizer import make_optimizer, rates_put_back
from .run import Training


def run(parts: Parts, recipe: Recipe, runtime: Runtime, accelerator: Accelerator, watcher: Watcher) -> Result:
    """One run, or what is left of it. The model is left trained, in the mode and without the wrappers that it came
    with."""
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
        resumption = Resumption.found(runtime, recipe, agreement, screen.note)
        runtime = resumption.sized(runtime)
        stream = stack.enter_context(opened(parts.train_data, recipe.random_seed, accelerator, agreement))
        assembly, plan, runtime = planned(parts, recipe, runtime, accelerator, agreement, stream)
        assembly.tell_through(screen.note)
        precision, device = accelerator.mixed_precision, accelerator.device.type
        facts = facts_of(parts, recipe, runtime, optimizer, assembly, plan.batching, precision, device)
        plan = resumption.going_on(plan, facts)
        warmup = plan.warmup_updates(recipe.warmup_steps, recipe.warmup_ratio)
        notes = [*assembly.notes(), how_cut(runtime, plan.batching, assembly.train.knows_lengths)]
        screen.banner(plan, notes, warmup, precision, device)
        if told := resumption.in_words(facts, plan.n_windows):
            screen.note(told)

        training = training_of(
            Settled(
                parts, recipe, runtime, accelerator, agreement, optimizer, assembly, plan, warmup, resumption, facts,
                folder, screen, watcher,
            ),
            stack,
        )  # fmt: skip
        training.to_the_end()
        if training.best.restore(model):
            screen.note(f"Restored the weights of the epoch with validation loss {training.best.loss:.4f}.")
        result = _result(training, accelerator)
    saved = model if watcher.saves_model else None
    result = write_outputs(result, training.recorder.ledger, saved, parts.tokenizer, accelerator)
    accelerator.wait_for_everyone()
    screen.result(result)
    return result


def _result(training: Training, accelerator: Accelerator) -> Result:
    costs, scaler = training.feed.cutter.costs, accelerator.scaler
    return Result.of(
        training.recorder.ledger,
        training.plan.batching,
        work=_over_processes(training.work, accelerator),
        training_time=training.clock.seconds,
        planner_costs=None if costs is None else list(astuple(costs)),
        out_of_memory=training.adaptation.headroom.failures,
        amp_enabled=accelerator.mixed_precision != "no",
        final_loss_scale=None if scaler is None else scaler.get_scale(),
        output_dir=accelerator.project_dir,
    )


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
