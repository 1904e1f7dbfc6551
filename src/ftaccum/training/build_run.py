"""From what is settled of a run to everything that takes part in its training, made and wrapped."""

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.optim import Optimizer

from ..checkpoint.directory import CheckpointDirectory
from ..checkpoint.early_stopping import BestEpoch
from ..checkpoint.manager import CheckpointManager
from ..checkpoint.resume import ResumePoint
from ..checkpoint.state import Stateful, TrainState
from ..checkpoint.writing import CheckpointWriter
from ..data.prefetch import WindowLoader
from ..planning.course import BasePlan
from ..planning.micro_batches import MicroBatchPlanner
from ..runtime.gradients.fp32 import gradient_strategy
from ..runtime.model_context import compile_model
from ..runtime.process_group import ProcessGroup
from ..runtime.run_dir import lock
from ..settings import Recipe, Runtime
from ..tracking.console import Console
from ..tracking.ledger import Ledger
from ..tracking.metrics_logger import MetricsLogger, tracking
from ..tracking.throughput import Throughput
from .build_data import TrainingData
from .build_plan import micro_batch_planner
from .callbacks import Callback, Milestones
from .components import Components
from .evaluation import Evaluation, NoEvaluation
from .loop import TrainingLoop
from .nonfinite import NonFiniteHandler
from .oom_recovery import OomRecovery
from .optimizer import make_schedule
from .pass_costs import Calibration, NoCalibration, PassTimer
from .run import Clock, Training


@dataclass(frozen=True)
class Settled:
    """A run before its first window.

    Attributes:
        folder: for its outputs, if anywhere.
        facts: what its checkpoints say of it.
    """

    components: Components
    recipe: Recipe
    runtime: Runtime
    accelerator: Accelerator
    process_group: ProcessGroup
    optimizer: Optimizer
    data: TrainingData
    plan: BasePlan
    warmup: int
    resume_point: ResumePoint
    metadata: dict[str, Any]
    folder: Path | None
    console: Console
    callback: Callback


def training_of(run: Settled, stack: ExitStack) -> Training:
    """Training, ready for the next window: the first one, or the one behind a checkpoint.

    Args:
        stack: ends what ends with the run.
    """
    components, recipe, runtime, plan, accelerator = run.components, run.recipe, run.runtime, run.plan, run.accelerator
    if (folder := run.folder) is not None:
        run.process_group.run_on_main(lambda: stack.enter_context(lock(folder)))
    schedule = make_schedule(recipe.lr_scheduler, run.optimizer, run.warmup, plan.n_windows)
    if runtime.compile:
        stack.enter_context(compile_model(components.model))
    gradients = gradient_strategy(run.optimizer, in_float32=runtime.accumulate_in_fp32)
    wrapped, prepared = gradients.prepare(accelerator, components.model)
    calibration = _calibration(runtime, accelerator)
    window_loader = WindowLoader(
        plan,
        run.data.train,
        micro_batch_planner(runtime, plan.batch_sizes),
        accelerator.process_index,
        run.process_group.run_on_all,
    )
    oom_recovery = OomRecovery(window_loader, run.process_group, calibration, run.console.note)
    nonfinite = NonFiniteHandler(
        components.model,
        run.data.objective,
        run.data.train,
        run.process_group,
        accelerator.device,
        run.console.note,
        raises=runtime.on_nonfinite == "error",
        patience=runtime.nonfinite_patience,
    )
    loop = TrainingLoop(
        accelerator,
        wrapped,
        run.data.objective,
        prepared,
        schedule,
        gradients,
        plan.rate_factor,
        max_grad_norm=recipe.gradient_clip_norm or math.inf,
        process_group=run.process_group,
        calibration=calibration,
    )
    ledger = Ledger()
    stack.enter_context(tracking(accelerator, vars(recipe) | vars(runtime), plan.batch_sizes))
    evaluate = _evaluation(run, replace(window_loader.planner, packed=False))
    work, clock = Throughput(), Clock()
    best = BestEpoch(recipe.early_stopping_patience, recipe.restore_best_weights)
    metrics_logger = MetricsLogger(
        accelerator, ledger, stack.enter_context(run.console.bar(plan.n_windows)), plan.batch_sizes, work
    )

    def validate() -> float | None:
        metrics_logger.drain()  # the run may end here, and then all of its updates are in the ledger
        return evaluate(components.model)[0]

    milestones = Milestones(run.callback, plan, validate, work)
    extra_state: dict[str, Stateful] = {
        "adaptation": oom_recovery,
        "divergence": nonfinite.counts,
        "recorder": metrics_logger,
        "milestones": milestones,
        "clock": clock,
    }
    state = TrainState(
        accelerator,
        components.model,
        components.loss_fn,
        run.optimizer,
        schedule,
        ledger,
        best,
        work,
        extra_state,
        run.console.note,
    )
    run.resume_point.restore(state)  # only a run that can go on changes what is on the disk
    if run.folder is not None and accelerator.is_main_process:
        ledger.keep_in(run.folder / "ledger.jsonl")
        ledger.catch_up()
    checkpoint_manager = _keeper(run, state, metrics_logger, nonfinite, stack)
    training = Training(
        components.model,
        plan,
        window_loader,
        loop,
        oom_recovery,
        nonfinite,
        metrics_logger,
        milestones,
        evaluate,
        best,
        checkpoint_manager,
        run.console,
        work,
        clock,
    )
    if run.resume_point.path is None:
        # Before the first update also to have a metric that cannot be computed fail now and not after an epoch.
        ledger.initial_val_loss = training.look_before()
    run.resume_point.restore_generators(state, recipe.random_seed)
    return training


def _keeper(
    run: Settled, state: TrainState, metrics_logger: MetricsLogger, nonfinite: NonFiniteHandler, stack: ExitStack
) -> CheckpointManager:
    directory, writer = None if run.folder is None else CheckpointDirectory(run.folder), None
    if directory is not None and run.accelerator.is_main_process:
        directory.set_aside(run.resume_point.path, run.resume_point.damaged, run.console.note)
        if not run.data.train.repeats:
            run.console.note(
                "Note: rows or collator draw from a generator of their own. A run that is interrupted sees other draws "
                "behind that; those of `random`, `numpy.random` and `torch` it would see again."
            )
        writer = CheckpointWriter(directory, run.runtime.keep_checkpoints, run.console.note, run.resume_point.path)
    stop_signals = run.callback.stop_signals(saves=directory is not None)
    stack.enter_context(stop_signals.kept())
    checkpoint_manager = CheckpointManager(
        state,
        run.process_group,
        stop_signals,
        writer,
        directory,
        run.metadata,
        metrics_logger,
        every=run.runtime.checkpoint_every,
        at_epochs=run.callback.saves_model,
        is_sound=nonfinite.counts.is_sound,
        tell=run.console.note,
        endings=run.callback.endings,
    )
    stack.callback(checkpoint_manager.close)
    return checkpoint_manager


def _calibration(runtime: Runtime, accelerator: Accelerator) -> PassTimer:
    # A clock never says the same twice, and on a CPU all else does: what can be gone on with is to be one run, whether
    # it is interrupted or not. (On a GPU, costs that were measured before a checkpoint hold on behind it.)
    devices = ("cpu", "cuda") if runtime.output_dir is None else ("cuda",)
    measures = runtime.planner and runtime.planner_costs is None and not runtime.deterministic
    return Calibration(accelerator) if measures and accelerator.device.type in devices else NoCalibration()


def _evaluation(run: Settled, planner: MicroBatchPlanner) -> Evaluation | NoEvaluation:
    data = run.data
    if data.val is None or data.val_rows is None:
        return NoEvaluation()
    return Evaluation(
        run.accelerator,
        data.objective,
        data.val,
        n_rows=len(data.val_rows),
        planner=planner,
        compute_metrics=run.components.compute_metrics,
        ignore_index=data.ignore_index,
        process_group=run.process_group,
    )
