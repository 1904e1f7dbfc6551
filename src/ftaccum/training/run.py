"""A run in progress: epoch by epoch, from where it stands to its end."""

import math
import time
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..checkpoint.early_stopping import BestEpoch
from ..checkpoint.manager import CheckpointManager
from ..data.prefetch import WindowLoader
from ..errors import DataError, DivergedError, MetricsError
from ..planning.course import BasePlan
from ..runtime.memory import AgreedOutOfMemoryError
from ..runtime.process_group import report_lost_process
from ..tracking.console import Console
from ..tracking.ledger import EpochEntry
from ..tracking.metrics_logger import MetricsLogger
from ..tracking.throughput import Throughput
from .callbacks import Milestones
from .evaluation import Evaluation, NoEvaluation
from .loop import StepResult, TrainingLoop
from .nonfinite import NonFiniteHandler, NonFiniteUpdate
from .oom_recovery import OomRecovery


class Clock:
    """The time in training and evaluation, over all parts of a run that was interrupted."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._started = time.perf_counter() - state_dict["seconds"]


@dataclass
class Training:
    """What takes part in training, ready for the next window."""

    model: nn.Module
    plan: BasePlan
    window_loader: WindowLoader
    loop: TrainingLoop
    oom_recovery: OomRecovery
    nonfinite: NonFiniteHandler
    metrics_logger: MetricsLogger
    milestones: Milestones
    evaluate: Evaluation | NoEvaluation
    best: BestEpoch
    checkpoint_manager: CheckpointManager
    console: Console
    work: Throughput
    clock: Clock

    def look_before(self) -> float | None:
        """The validation loss before the first update."""
        val_loss, metrics = self.evaluate(self.model)
        self.console.epoch(EpochEntry(-1, math.nan, val_loss, metrics), self.plan.n_epochs)
        return val_loss

    def to_the_end(self) -> None:
        """Trains and evaluates what is left of the run.

        Raises:
            LostProcessError: where another process is gone.
        """
        with report_lost_process(self.loop.process_group.is_single, self._so_far):
            for epoch in self.plan.epochs:
                if epoch < self.metrics_logger.n_epochs:  # it had ended before the run was interrupted
                    self._pass_over(epoch)
                elif self.best.has_ended:
                    return
                else:
                    with self.checkpoint_manager.saved_on(self._agreed, lambda: not self.loop.in_update):
                        self._train(epoch)
                        evaluated = self._evaluated()
                    self._end(epoch, *evaluated)
        if shortfall := self.plan.shortfall():
            self.console.note(shortfall)

    @property
    def _agreed(self) -> tuple[type[Exception], ...]:
        """Errors that all processes raise alike."""
        on_all = (DataError, DivergedError, MetricsError, AgreedOutOfMemoryError)
        return (Exception,) if self.loop.process_group.is_single else on_all

    def _train(self, epoch: int) -> None:
        local_windows = self.window_loader.epoch(epoch, self.metrics_logger.n_windows)
        with self.work.timed():
            self.loop.train(local_windows, self.oom_recovery.smaller, self._on_window)

    def _on_window(self, outcome: StepResult, fault: NonFiniteUpdate | None) -> None:
        self.metrics_logger.window(outcome)
        self.oom_recovery.window_done()
        self.milestones.window_done()
        self.nonfinite.window_done(fault)
        self.checkpoint_manager.after_update()

    def _evaluated(self) -> tuple[float | None, dict[str, float]]:
        self.loop.sync_buffers()
        return self.evaluate(self.model)

    def _end(self, epoch: int, val_loss: float | None, metrics: dict[str, float]) -> None:
        entry = self.metrics_logger.epoch(val_loss, metrics)
        self.console.epoch(entry, self.plan.n_epochs)
        self.milestones.epoch_done(entry)
        if self.best.ends_after(entry.val_loss, self.model, updated=self.plan.n_windows_of(epoch) > 0):
            self.console.note(self.best.describe())
        self.checkpoint_manager.after_epoch()

    def _pass_over(self, epoch: int) -> None:
        """Goes through the windows of an epoch that has ended: a stream has to be read through."""
        for _ in self.plan.windows(epoch, self.metrics_logger.n_windows):
            pass

    def _so_far(self) -> str:
        return f"{self.metrics_logger.n_windows} updates were taken. {self.checkpoint_manager.describe()}"
