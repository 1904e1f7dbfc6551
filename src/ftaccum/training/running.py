"""One run: the one place where the parts meet."""

from contextlib import ExitStack
from dataclasses import astuple
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from ..checkpoint.compatibility import checkpoint_metadata
from ..checkpoint.resume import ResumePoint
from ..data.reading import open_stream
from ..errors import SettingsError
from ..runtime.model_context import model_context
from ..runtime.process_group import open_process_group
from ..settings import Recipe, Runtime
from ..tracking.export import write_outputs
from ..tracking.result import Result
from ..tracking.throughput import Throughput
from .build_plan import build_data_and_plan, how_cut
from .build_run import Settled, training_of
from .callbacks import Callback
from .components import Components
from .optimizer import make_optimizer, preserve_learning_rates
from .run import Training


def run(
    components: Components, recipe: Recipe, runtime: Runtime, accelerator: Accelerator, callback: Callback
) -> Result:
    """One run, or what is left of it. The model is left trained, in the mode and without the wrappers that it came
    with."""
    model, folder = components.model, _made(runtime.output_dir)
    console = callback.console(accelerator.is_main_process, runtime.progress)
    _check_precision(model, runtime, accelerator)
    optimizer = make_optimizer(model, components.optimizer, recipe.learning_rate, recipe.weight_decay)
    if not getattr(model, "hf_device_map", None):  # a model that was spread over devices stays so
        model.to(accelerator.device)
    with ExitStack() as stack:
        stack.enter_context(model_context(model, gradient_checkpointing=runtime.gradient_checkpointing))
        stack.enter_context(preserve_learning_rates(optimizer))
        process_group = stack.enter_context(open_process_group(accelerator.num_processes))
        resume_point = ResumePoint.found(runtime, recipe, process_group, console.note)
        runtime = resume_point.sized(runtime)
        stream = stack.enter_context(open_stream(components.train_data, recipe.random_seed, accelerator, process_group))
        data, plan, runtime = build_data_and_plan(components, recipe, runtime, accelerator, process_group, stream)
        data.tell_through(console.note)
        precision, device = accelerator.mixed_precision, accelerator.device.type
        metadata = checkpoint_metadata(
            components, recipe, runtime, optimizer, data, plan.batch_sizes, precision, device
        )
        plan = resume_point.resume_after(plan, metadata)
        warmup = plan.warmup_updates(recipe.warmup_steps, recipe.warmup_ratio)
        notes = [*data.notes(), how_cut(runtime, plan.batch_sizes, data.train.knows_lengths)]
        console.banner(plan, notes, warmup, precision, device)
        if told := resume_point.describe(metadata, plan.n_windows):
            console.note(told)

        training = training_of(
            Settled(
                components,
                recipe,
                runtime,
                accelerator,
                process_group,
                optimizer,
                data,
                plan,
                warmup,
                resume_point,
                metadata,
                folder,
                console,
                callback,
            ),
            stack,
        )
        training.to_the_end()
        if training.best.restore(model):
            console.note(f"Restored the weights of the epoch with validation loss {training.best.loss:.4f}.")
        result = _result(training, accelerator)
    saved = model if callback.saves_model else None
    result = write_outputs(result, training.metrics_logger.ledger, saved, components.tokenizer, accelerator)
    accelerator.wait_for_everyone()
    console.result(result)
    return result


def _result(training: Training, accelerator: Accelerator) -> Result:
    costs, scaler = training.window_loader.planner.costs, accelerator.scaler
    return Result.of(
        training.metrics_logger.ledger,
        training.plan.batch_sizes,
        work=_over_processes(training.work, accelerator),
        training_time=training.clock.seconds,
        planner_costs=None if costs is None else list(astuple(costs)),
        out_of_memory=training.oom_recovery.memory_limits.failures,
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


def _over_processes(work: Throughput, accelerator: Accelerator) -> Throughput:
    counts = torch.tensor([work.rows, work.tokens, work.positions, work.passes], device=accelerator.device)
    rows, tokens, positions, passes = accelerator.reduce(counts, "sum").tolist()
    return Throughput(rows, tokens, positions, passes, work.seconds)


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
