"""A run in progress: epoch by epoch, from where it stands to its end."""

import math
import time
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..checkpoint.early_stopping import BestEpoch
from ..checkpoint.manager import Keeper
from ..data.prefetch import Feed
from ..errors import DataError, DivergedError, MetricsError
from ..planning.course import Course
from ..runtime.memory import AgreedOutOfMemoryError
from ..runtime.others import others_watched
from ..tracking.console import Screen
from ..tracking.ledger import EpochEntry
from ..tracking.metrics_logger import Recorder
from ..tracking.throughput import Work
from .callbacks import Milestones
from .evaluation import Evaluation, NoEvaluation
from .loop import Outcome, TrainingLoop
from .nonfinite import Divergence, Fault
from .oom_recovery import Adaptation


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
    plan: Course
    feed: Feed
    loop: TrainingLoop
    adaptation: Adaptation
    divergence: Divergence
    recorder: Recorder
    milestones: Milestones
    evaluate: Evaluation | NoEvaluation
    best: BestEpoch
    keeper: Keeper
    screen: Screen
    work: Work
    clock: Clock

    def look_before(self) -> float | None:
        """The validation loss before the first update."""
        val_loss, metrics = self.evaluate(self.model)
        self.screen.epoch(EpochEntry(-1, math.nan, val_loss, metrics), self.plan.n_epochs)
        return val_loss

    def to_the_end(self) -> None:
        """Trains and evaluates what is left of the run.

        Raises:
            LostProcessError: where another process is gone.
        """
        with others_watched(self.loop.agreement.alone, self._so_far):
            for epoch in self.plan.epochs:
                if epoch < self.recorder.n_epochs:  # it had ended before the run was interrupted
                    self._pass_over(epoch)
                elif self.best.has_ended:
                    return
                else:
                    with self.keeper.saved_on(self._agreed, lambda: not self.loop.in_update):
                        self._train(epoch)
                        evaluated = self._evaluated()
                    self._end(epoch, *evaluated)
        if shortfall := self.plan.shortfall():
            self.screen.note(shortfall)

    @property
    def _agreed(self) -> tuple[type[Exception], ...]:
        """Errors that all processes raise alike."""
        on_all = (DataError, DivergedError, MetricsError, AgreedOutOfMemoryError)
        return (Exception,) if self.loop.agreement.alone else on_all

    def _train(self, epoch: int) -> None:
        portions = self.feed.epoch(epoch, self.recorder.n_windows)
        with self.work.timed():
            self.loop.train(portions, self.adaptation.smaller, self._on_window)

    def _on_window(self, outcome: Outcome, fault: Fault | None) -> None:
        self.recorder.window(outcome)
        self.adaptation.window_done()
        self.milestones.window_done()
        self.divergence.window_done(fault)
        self.keeper.after_update()

    def _evaluated(self) -> tuple[float | None, dict[str, float]]:
        self.loop.sync_buffers()
        return self.evaluate(self.model)

    def _end(self, epoch: int, val_loss: float | None, metrics: dict[str, float]) -> None:
        entry = self.recorder.epoch(val_loss, metrics)
        self.screen.epoch(entry, self.plan.n_epochs)
        self.milestones.epoch_done(entry)
        if self.best.ends_after(entry.val_loss, self.model, updated=self.plan.n_windows_of(epoch) > 0):
            self.screen.note(self.best.in_words())
        self.keeper.after_epoch()

    def _pass_over(self, epoch: int) -> None:
        """Goes through the windows of an epoch that has ended: a stream has to be read through."""
        for _ in self.plan.windows(epoch, self.recorder.n_windows):
            pass

    def _so_far(self) -> str:
        return f"{self.recorder.n_windows} updates were taken. {self.keeper.in_words()}"
