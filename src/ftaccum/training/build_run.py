"""The components of a training run, each built once, on first use."""

import math
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..accumulation.audit import GradientAuditor
from ..checkpoint.compatibility import RunIdentity
from ..checkpoint.directory import CheckpointDirectory
from ..checkpoint.early_stopping import BestEpoch
from ..checkpoint.manager import CheckpointManager, SavePolicy
from ..checkpoint.resume import ResumePoint
from ..checkpoint.state import TrainState
from ..data.prefetch import WindowLoader
from ..errors import SettingsError
from ..objective.rounding import Rounding
from ..planning.audit_schedule import AuditSchedule
from ..planning.base_plan import BasePlan
from ..planning.batch_size import BatchSizes
from ..runtime.gradients.fp32 import gradient_strategy
from ..runtime.gradients.plain import GradientStrategy
from ..runtime.optimizers import evaluation_weights, switches_weights, training_weights
from ..tracking.console import Console
from ..tracking.ledger import Ledger
from ..tracking.metrics_logger import MetricsLogger, tracking
from .audit import AuditHandler
from .base_run import Run
from .build_identity import build_identity
from .build_plan import refuse_single_rows, report_inexact
from .callbacks import Callback, Milestones
from .closure import check_step
from .config import RunConfig
from .evaluation import Evaluation
from .loop import TrainingLoop
from .nonfinite import NonFiniteHandler
from .oom_recovery import OomRecovery
from .optimizer import make_optimizer
from .rates import describe_rates, preserve_learning_rates
from .schedule import make_schedule


class TrainingSetup(Run):
    """The components of a training run. `TrainingRun` trains with them."""

    def __init__(self, config: RunConfig, callback: Callback) -> None:
        super().__init__(config)
        self.callback, self.logs = callback, callback.logs
        self.weights_in_training = ExitStack()  # closing it leaves the model with the weights to evaluate and save

    @cached_property
    def console(self) -> Console:
        return self.callback.console(self.process_group.is_main, self.config.runtime.progress)

    @cached_property
    def optimizer(self) -> Optimizer:
        """The optimizer. Its learning rates are restored after the run, since it may be the user's own object."""
        config = self.config
        optimizer = make_optimizer(self.model, config.components.optimizer, config.recipe, config.given)
        check_step(optimizer, scales_gradients=self.accelerator.scaler is not None)
        self._inner.enter_context(preserve_learning_rates(optimizer))
        self.weights_in_training.enter_context(training_weights(optimizer))
        self._inner.callback(self.weights_in_training.close)
        return optimizer

    @property
    def notes(self) -> list[str]:
        """The banner's lines about a user's optimizer, which may have rates of its own."""
        if self.config.components.optimizer is None:
            return []
        scheduled = switches_weights(self.optimizer) and self.config.recipe.lr_scheduler != "constant"
        hint = ["Note: a schedule-free optimizer is meant for `lr_scheduler='constant'`"] if scheduled else []
        return [describe_rates(self.optimizer), *hint]

    @cached_property
    def gradients(self) -> GradientStrategy:
        return gradient_strategy(self.optimizer, in_float32=self.config.runtime.accumulate_in_fp32)

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

    @cached_property
    def identity(self) -> RunIdentity:
        """The identity of the run, which its checkpoints save so that only the same run resumes from them."""
        return build_identity(
            self.config,
            self.data,
            self.optimizer,
            self.batch_sizes,
            self.accelerator,
            plans=self.planner.costs is not None,
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
        refuse_single_rows(self.data, fresh, self.planner)
        return self.resume_point.resume_plan(fresh, self.identity)

    @cached_property
    def n_warmup(self) -> int:
        recipe = self.config.recipe
        return self.plan.warmup_updates(recipe.warmup_steps, recipe.warmup_ratio)

    @cached_property
    def schedule(self) -> LRScheduler:
        return make_schedule(self.config.recipe.lr_scheduler, self.optimizer, self.n_warmup, self.plan.n_windows)

    @cached_property
    def window_loader(self) -> WindowLoader:
        index = self.accelerator.process_index
        return WindowLoader(self.plan, self.data.train, self.planner, self.process_group, index)

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
            self.window_loader,
        )
        dtypes = [p.dtype for p in self.model.parameters() if p.requires_grad]
        return AuditHandler(
            auditor,
            AuditSchedule(runtime.audit, self.plan.n_windows),
            objective.report,
            self.process_group,
            self.metrics_logger.audit,
            rounding=Rounding.of(dtypes, self.accelerator.mixed_precision),
            on_inexact=runtime.on_inexact,
        )

    @cached_property
    def metrics_logger(self) -> MetricsLogger:
        settings = vars(self.config.recipe) | vars(self.config.runtime)
        self._inner.enter_context(tracking(self.accelerator, settings, self.batch_sizes))
        bar = self._inner.enter_context(self.console.bar(self.plan.n_windows))
        return MetricsLogger(self.accelerator, Ledger(), bar, self.batch_sizes)

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """The evaluation of the model; None if there are no validation rows."""
        data = self.data
        if data.val is None or data.val_rows is None:
            return None
        return Evaluation(
            self.accelerator,
            data.objective,
            data.val,
            n_rows=len(data.val_rows),
            planner=replace(self.planner, packed=False),
            process_group=self.process_group,
            compute_metrics=self.config.components.compute_metrics,
            ignore_index=data.ignore_index,
        )

    def evaluate(self) -> tuple[float | None, dict[str, float]]:
        """Return the current validation loss and metrics; None and an empty dict if there are no validation rows.

        Sync buffers first, so that all processes evaluate the same model.
        """
        self.accumulator.sync_buffers()
        if self.evaluation is None:
            return None, {}
        with evaluation_weights(self.optimizer):
            return self.evaluation(self.model)

    @cached_property
    def best(self) -> BestEpoch:
        return BestEpoch(self.config.recipe.early_stopping_patience, self.config.recipe.restore_best_weights)

    @cached_property
    def milestones(self) -> Milestones:
        return Milestones(self.callback, self.plan, self.validate, self.metrics_logger.throughput)

    @cached_property
    def state(self) -> TrainState:
        """The state that later windows depend on, which checkpoints save."""
        components = self.config.components
        return TrainState(
            self.accelerator,
            self.model,
            components.loss_fn,
            self.optimizer,
            self.schedule,
            self.metrics_logger,
            self.best,
            {
                "oom_recovery": self.oom_recovery,
                "nonfinite": self.nonfinite.counts,
                "milestones": self.milestones,
                "audits": self.audits,
            },
        )

    @cached_property
    def checkpoint_manager(self) -> CheckpointManager:
        runtime, callback, checkpoints = self.config.runtime, self.callback, self.checkpoints
        stop_signals = callback.stop_signals(saves=checkpoints is not None)
        self._inner.enter_context(stop_signals.kept())
        manager = CheckpointManager(
            self.state,
            self.identity,
            checkpoints,
            SavePolicy(runtime.checkpoint_every, callback.saves_model, runtime.keep_checkpoints, callback.endings),
            self.process_group,
            stop_signals,
            is_healthy=self.nonfinite.counts.is_sound,
            resumed_from=self.resume_point.path,
        )
        self._inner.callback(manager.close)
        return manager

    def _prepare_model(self, stack: ExitStack) -> None:
        if self.accelerator.mixed_precision == "fp16" and not self.config.runtime.accumulate_in_fp32:
            _refuse_float16(self.model)
        _ = self.optimizer  # must be made before the model moves to its device
        super()._prepare_model(stack)

    def validate(self) -> float | None:
        """Return the current validation loss, between two windows."""
        self.metrics_logger.drain()  # the run may end here, and the ledger must then have all of its updates
        return self.evaluate()[0]


def _refuse_float16(model: nn.Module) -> None:
    if any(p.dtype == torch.float16 and p.requires_grad for p in model.parameters()):
        raise SettingsError(
            [
                "`mixed_precision` is 'fp16', but the trainable weights are float16, whose gradients cannot be "
                "unscaled. Load the model in float32 (`dtype=torch.float32`), or use `accumulate_in_fp32`."
            ]
        )
