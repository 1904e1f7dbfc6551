"""The components of a training run, each built once, on first use."""

import math
from functools import cached_property

from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerState

from ..accumulation.audit import GradientAuditor
from ..accumulation.audit_rows import audited_window
from ..accumulation.audit_sample import AuditedWindow
from ..checkpoint.compatibility import RunIdentity
from ..checkpoint.directory import CheckpointDirectory
from ..checkpoint.resume import ResumePoint
from ..data.prefetch import LocalWindow, WindowLoader
from ..objective.rounding import Rounding
from ..planning.audit_schedule import AuditSchedule
from ..planning.base_plan import BasePlan
from ..planning.batch_size import BatchSizes
from ..planning.evaluation_schedule import EvaluationSchedule
from ..planning.halves import MeasuredWindows
from ..planning.plan import Plan
from ..runtime.watched_state import WatchedState
from ..tracking.console import Console
from ..tracking.ledger import Ledger
from ..tracking.metrics_logger import MetricsLogger, tracking
from ..tracking.noise_scale import NoiseScaleRecorder
from ..tracking.selection import Criterion
from ..tracking.trackers import set_tracker_folder
from ..tracking.trained_model import TrainedModel
from .audit import AuditHandler
from .build_identity import build_identity
from .build_noise import build_measured_windows, repeated_rows
from .build_optimizer import OptimizedRun
from .build_plan import refuse_single_rows, report_inexact, report_loss_scale
from .build_sharding import describe_sharding
from .callbacks import Callback
from .check_window_loss import check_loss_memory, check_sharded_window
from .config import RunConfig
from .loop import TrainingLoop
from .nonfinite import NonFiniteHandler
from .oom_recovery import OomRecovery
from .schedule import make_schedule
from .trainer_arguments import CallbackArguments
from .trainer_callbacks import CallbackHandler


class TrainingSetup(OptimizedRun):
    """The components of a training run. `TrainingRun` trains with them."""

    def __init__(self, config: RunConfig, callback: Callback) -> None:
        super().__init__(config)
        self.callback = callback
        self.logs = callback.logs or config.runtime.verbosity == "debug"

    @cached_property
    def console(self) -> Console:
        runtime = self.config.runtime
        return self.callback.console(self.process_group.is_main and not runtime.is_quiet, runtime.shows_bars)

    @property
    def notes(self) -> list[str]:
        """The banner's lines about sharding, adapters, and an optimizer or groups that are not the default."""
        return [*describe_sharding(self.sharding, self.call_order), *self.adapter_notes, *self.optimizer_notes]

    @property
    def trained_model(self) -> TrainedModel:
        """The model, and how its files are to be written."""
        return TrainedModel(self.model, self.config.components.tokenizer, self.config.runtime.save)

    @cached_property
    def checkpoints(self) -> CheckpointDirectory | None:
        return None if self.run_dir is None else CheckpointDirectory(self.run_dir.checkpoints)

    @cached_property
    def resume_point(self) -> ResumePoint:
        """The checkpoint that the run continues from, if it is resumed."""
        return ResumePoint.find(self.config.recipe, self.config.runtime, self.checkpoints, self.process_group)

    @cached_property
    def batch_sizes(self) -> BatchSizes:
        return self.new_batch_sizes(self.resume_point.batch_size)

    @property
    def evaluation_rows(self) -> int:
        """Rows of a group of validation rows. A resumed run keeps them, so that its losses stay comparable."""
        checkpoint = self.resume_point.checkpoint
        known = None if checkpoint is None else checkpoint.metadata["trained_on"].get("evaluation_rows")
        return known or self.batch_sizes.effective_batch_size

    @cached_property
    def identity(self) -> RunIdentity:
        """The identity of the run, which its checkpoints save so that only the same run resumes from them."""
        return build_identity(
            self.config,
            self.data,
            self.optimizer,
            self.batch_sizes,
            self.accelerator,
            evaluation_rows=self.evaluation_rows,
            plans=self.planner.costs is not None,
            is_sharded=self.sharding is not None,
        )

    @cached_property
    def plan(self) -> BasePlan:
        """The windows of the run; if it is resumed, including those already trained on."""
        return self.resumed[0]

    @cached_property
    def resumed(self) -> tuple[BasePlan, ResumePoint]:
        """The windows of the run, and the point among them that it continues from."""
        fresh, report = self.new_plan(), self.data.objective.report
        is_main = self.process_group.is_main
        report_inexact(report, self.config.runtime, self.batch_sizes, self.planner, is_main=is_main)
        if is_main:
            steps = {sizes.gradient_accumulation_steps for _, sizes in self.batch_sizes.stages()}
            report_loss_scale(self.data.loss_divisor, steps)
        refuse_single_rows(self.data, fresh, self.planner)
        check_loss_memory(report, fresh, self.batch_sizes, self.accelerator.device, self.process_group)
        if self.sharding is not None:
            check_sharded_window(self.data.objective, is_compiled=self.config.runtime.compile)
        return self.resume_point.resume_plan(fresh, self.identity, self.evaluation_schedule(fresh).is_due)

    def evaluation_schedule(self, plan: BasePlan) -> EvaluationSchedule:
        """Return the evaluations within the epochs of a plan, as the settings or the search want them."""
        every, rows = self.config.recipe.evaluate_every, self.callback.evaluation_rows(plan)
        if rows is not None:
            return EvaluationSchedule.after_rows(rows, plan.rows_after)
        if isinstance(every, float):
            assert isinstance(plan, Plan), "a share of a stream is refused with the settings"
            return EvaluationSchedule.every_share(every, plan.n_rows, plan.rows_after)
        return EvaluationSchedule.every_updates(every) if isinstance(every, int) else EvaluationSchedule()

    @cached_property
    def n_warmup(self) -> int:
        recipe = self.config.recipe
        return self.plan.warmup_updates(recipe.warmup_steps, recipe.warmup_ratio)

    @cached_property
    def schedule(self) -> LRScheduler:
        recipe, is_own = self.config.recipe, self.config.components.optimizer is not None
        peak = float(self.optimizer.param_groups[0]["lr"] or 0) if is_own else recipe.learning_rate
        return make_schedule(recipe, self.optimizer, peak, self.n_warmup, self.plan.n_windows)

    @cached_property
    def window_loader(self) -> WindowLoader:
        index, measured = self.accelerator.process_index, self.measured_windows
        return WindowLoader(self.plan, self.data.train, self.planner, self.process_group, index, measured)

    @cached_property
    def measured_windows(self) -> MeasuredWindows:
        """The windows in which the gradient noise scale is measured."""
        runtime, objective, is_sharded = self.config.runtime, self.data.objective, self.sharding is not None
        return build_measured_windows(runtime, self.plan, objective, self.optimizer, is_sharded=is_sharded)

    @cached_property
    def oom_recovery(self) -> OomRecovery:
        return OomRecovery(self.window_loader, self.process_group)

    @cached_property
    def nonfinite(self) -> NonFiniteHandler:
        runtime = self.config.runtime
        return NonFiniteHandler(
            self.model,
            self.data.objective,
            self.data.train,
            self.process_group,
            self.accelerator.device,
            raises=runtime.on_nonfinite == "error",
            patience=runtime.nonfinite_patience,
            independent_passes=self.independent_passes,
        )

    @cached_property
    def loop(self) -> TrainingLoop:
        schedule = self.schedule  # made before Accelerate wraps the optimizer's step, which a schedule wraps too
        return TrainingLoop(
            self.accelerator,
            self.accumulator,
            self.gradients,
            self.prepared[1],
            schedule,
            self.process_group,
            rate_factor=self.plan.rate_factor,
            max_grad_norm=self.config.recipe.gradient_clip_norm or math.inf,
        )

    @cached_property
    def audits(self) -> AuditHandler:
        runtime, objective = self.config.runtime, self.data.objective
        assert not isinstance(runtime.audit, str), "the settings have parsed it"
        auditor = GradientAuditor(
            self.accelerator,
            self.model,
            objective,
            self.gradients,
            self.process_group,
            self.new_accumulator(self.prepared[0], self.accumulator.synced_buffers()),
        )
        audit = runtime.audit if self.window_loader.loader.repeats else False  # an audit loads rows again
        dtypes = {p.dtype for p in self.model.parameters()}
        return AuditHandler(
            auditor,
            AuditSchedule(audit, self.plan.n_windows),
            objective.report,
            self.process_group,
            self.loss_state,
            self.metrics_logger.audit,
            rounding=Rounding.of(dtypes, self.accelerator.mixed_precision),
            on_inexact=runtime.on_inexact,
        )

    @cached_property
    def loss_state(self) -> WatchedState:
        """The state of the loss, which callbacks may change."""
        objective, count_items = self.data.objective, self.config.components.count_items
        return WatchedState(self.model, lambda: {**objective.state, "count_items": count_items})

    def audited_window(self, window: LocalWindow) -> AuditedWindow:
        """Return a window as audits see it."""
        return audited_window(window, self.window_loader, self.data.objective.count)

    @cached_property
    def criterion(self) -> Criterion:
        """The criterion that decides which evaluation is the best."""
        recipe = self.config.recipe
        return Criterion.of_settings(recipe.metric_for_best, recipe.greater_is_better, recipe.early_stopping_min_delta)

    @cached_property
    def callback_handler(self) -> CallbackHandler:
        components, accelerator = self.config.components, self.accelerator
        evaluates = self.data.val_rows is not None
        arguments = CallbackArguments.of_run(
            self.config.recipe,
            self.config.runtime,
            self.batch_sizes,
            self.criterion,
            accelerator,
            evaluates=evaluates,
        )
        state = TrainerState(
            max_steps=self.plan.n_windows,
            num_train_epochs=self.plan.n_epochs,
            train_batch_size=self.batch_sizes.batch_size,
            is_local_process_zero=accelerator.is_local_main_process,
            is_world_process_zero=accelerator.is_main_process,
        )
        state.compute_steps(arguments, state.max_steps)
        objects = {
            "model": self.model,
            "processing_class": components.tokenizer,
            "optimizer": self.optimizer,
            "lr_scheduler": self.schedule,
            "train_dataloader": self.window_loader,
            "eval_dataloader": self.data.val,
        }
        return CallbackHandler(
            components.callbacks, self.process_group, arguments, state, objects, self.independent_passes
        )

    @cached_property
    def metrics_logger(self) -> MetricsLogger:
        settings = vars(self.config.recipe) | vars(self.config.runtime)
        set_tracker_folder(self.accelerator, self.run_dir, self.process_group, self.resume_point.path)
        self._inner.enter_context(tracking(self.accelerator, settings, self.batch_sizes))
        bar = self._inner.enter_context(self.console.bar(self.plan.n_windows))
        return MetricsLogger(
            self.accelerator,
            Ledger(),
            bar,
            self.batch_sizes,
            self.config.runtime.log_every,
            self.callback_handler.log,
            NoiseScaleRecorder(repeated_rows(self.plan)),
        )
