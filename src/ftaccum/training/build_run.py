"""From what is settled of a run to everything that takes part in its training, made and wrapped."""

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.optim import Optimizer

from ..checkpoint.directory import Shelf
from ..checkpoint.early_stopping import BestEpoch
from ..checkpoint.manager import Keeper
from ..checkpoint.resume import Resumption
from ..checkpoint.state import RunState, Stateful
from ..checkpoint.writing import Writer
from ..data.prefetch import Feed
from ..planning.course import Course
from ..planning.micro_batches import Cutter
from ..runtime.gradients.fp32 import window_gradients
from ..runtime.memory import Agreement
from ..runtime.model_context import compiled
from ..runtime.run_dir import held
from ..settings import Recipe, Runtime
from ..tracking.console import Screen
from ..tracking.ledger import Ledger
from ..tracking.metrics_logger import Recorder, tracking
from ..tracking.throughput import Work
from .build_data import Assembly
from .build_plan import cutter_of
from .callbacks import Milestones, Watcher
from .components import Parts
from .evaluation import Evaluation, NoEvaluation
from .loop import TrainingLoop
from .nonfinite import Divergence
from .oom_recovery import Adaptation
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

    parts: Parts
    recipe: Recipe
    runtime: Runtime
    accelerator: Accelerator
    agreement: Agreement
    optimizer: Optimizer
    assembly: Assembly
    plan: Course
    warmup: int
    resumption: Resumption
    facts: dict[str, Any]
    folder: Path | None
    screen: Screen
    watcher: Watcher


def training_of(run: Settled, stack: ExitStack) -> Training:
    """Training, ready for the next window: the first one, or the one behind a checkpoint.

    Args:
        stack: ends what ends with the run.
    """
    parts, recipe, runtime, plan, accelerator = run.parts, run.recipe, run.runtime, run.plan, run.accelerator
    if (folder := run.folder) is not None:
        run.agreement.from_main(lambda: stack.enter_context(held(folder)))
    schedule = make_schedule(recipe.lr_scheduler, run.optimizer, run.warmup, plan.n_windows)
    if runtime.compile:
        stack.enter_context(compiled(parts.model))
    gradients = window_gradients(run.optimizer, in_float32=runtime.accumulate_in_fp32)
    wrapped, prepared = gradients.prepare(accelerator, parts.model)
    calibration = _calibration(runtime, accelerator)
    feed = Feed(
        plan, run.assembly.train, cutter_of(runtime, plan.batching), accelerator.process_index, run.agreement.together
    )
    adaptation = Adaptation(feed, run.agreement, calibration, run.screen.note)
    divergence = Divergence(
        parts.model, run.assembly.objective, run.assembly.train, run.agreement, accelerator.device, run.screen.note,
        raises=runtime.on_nonfinite == "error", patience=runtime.nonfinite_patience,
    )  # fmt: skip
    loop = TrainingLoop(
        accelerator, wrapped, run.assembly.objective, prepared, schedule, gradients, plan.rate_factor,
        max_grad_norm=recipe.gradient_clip_norm or math.inf, agreement=run.agreement, calibration=calibration,
    )  # fmt: skip
    ledger = Ledger()
    stack.enter_context(tracking(accelerator, vars(recipe) | vars(runtime), plan.batching))
    evaluate = _evaluation(run, replace(feed.cutter, packed=False))
    work, clock = Work(), Clock()
    best = BestEpoch(recipe.early_stopping_patience, recipe.restore_best_weights)
    recorder = Recorder(accelerator, ledger, stack.enter_context(run.screen.bar(plan.n_windows)), plan.batching, work)

    def validate() -> float | None:
        recorder.drain()  # the run may end here, and then all of its updates are in the ledger
        return evaluate(parts.model)[0]

    milestones = Milestones(run.watcher, plan, validate, work)
    small: dict[str, Stateful] = {
        "adaptation": adaptation, "divergence": divergence.counts, "recorder": recorder, "milestones": milestones,
        "clock": clock,
    }  # fmt: skip
    state = RunState(
        accelerator, parts.model, parts.loss_fn, run.optimizer, schedule, ledger, best, work, small, run.screen.note
    )  # fmt: skip
    run.resumption.put_back(state)  # only a run that can go on changes what is on the disk
    if run.folder is not None and accelerator.is_main_process:
        ledger.keep_in(run.folder / "ledger.jsonl")
        ledger.catch_up()
    keeper = _keeper(run, state, recorder, divergence, stack)
    training = Training(
        parts.model, plan, feed, loop, adaptation, divergence, recorder, milestones, evaluate, best, keeper, run.screen,
        work, clock,
    )  # fmt: skip
    if run.resumption.path is None:
        # Before the first update also to have a metric that cannot be computed fail now and not after an epoch.
        ledger.initial_val_loss = training.look_before()
    run.resumption.put_back_generators(state, recipe.random_seed)
    return training


def _keeper(run: Settled, state: RunState, recorder: Recorder, divergence: Divergence, stack: ExitStack) -> Keeper:
    shelf, writer = None if run.folder is None else Shelf(run.folder), None
    if shelf is not None and run.accelerator.is_main_process:
        shelf.set_aside(run.resumption.path, run.resumption.damaged, run.screen.note)
        if not run.assembly.train.repeats:
            run.screen.note(
                "Note: rows or collator draw from a generator of their own. A run that is interrupted sees other draws "
                "behind that; those of `random`, `numpy.random` and `torch` it would see again."
            )
        writer = Writer(shelf, run.runtime.keep_checkpoints, run.screen.note, run.resumption.path)
    interrupts = run.watcher.interrupts(saves=shelf is not None)
    stack.enter_context(interrupts.kept())
    keeper = Keeper(
        state, run.agreement, interrupts, writer, shelf, run.facts, recorder,
        every=run.runtime.checkpoint_every, at_epochs=run.watcher.saves_model, is_sound=divergence.counts.is_sound,
        tell=run.screen.note, endings=run.watcher.endings,
    )  # fmt: skip
    stack.callback(keeper.close)
    return keeper


def _calibration(runtime: Runtime, accelerator: Accelerator) -> PassTimer:
    # A clock never says the same twice, and on a CPU all else does: what can be gone on with is to be one run, whether
    # it is interrupted or not. (On a GPU, costs that were measured before a checkpoint hold on behind it.)
    devices = ("cpu", "cuda") if runtime.output_dir is None else ("cuda",)
    measures = runtime.planner and runtime.planner_costs is None and not runtime.deterministic
    return Calibration(accelerator) if measures and accelerator.device.type in devices else NoCalibration()


def _evaluation(run: Settled, cutter: Cutter) -> Evaluation | NoEvaluation:
    assembly = run.assembly
    if assembly.val is None or assembly.val_rows is None:
        return NoEvaluation()
    return Evaluation(
        run.accelerator,
        assembly.objective,
        assembly.val,
        n_rows=len(assembly.val_rows),
        cutter=cutter,
        compute_metrics=run.parts.compute_metrics,
        ignore_index=assembly.ignore_index,
        agreement=run.agreement,
    )
