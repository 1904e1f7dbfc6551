"""The loop: what happens to one window after another, in order."""

import math
from collections.abc import Callable

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

from ..accumulation.accumulator import GradientAccumulator
from ..accumulation.window import AccumulatedWindow
from ..data.prefetch import LocalWindow, LocalWindows
from ..runtime.gradients.plain import GradientStrategy
from ..runtime.memory import FailedPass, WindowOutOfMemoryError, give_back_memory
from ..runtime.optimizers import OptimizerBackup
from ..runtime.process_group import ProcessGroup
from ..tracking.step import StepResult
from .closure import ClippedGradient, NonFiniteStepError, closure_of, needs_closure
from .nonfinite import NonFiniteUpdate
from .rates import rate_in_use, scale_learning_rates

# Returns a window in smaller micro-batches, given the pass of this process that ran out of memory.
Split = Callable[[LocalWindow, FailedPass | None], LocalWindow]
BeforeUpdate = Callable[[LocalWindow], None]
OnStep = Callable[[StepResult, NonFiniteUpdate | None], None]


class TrainingLoop:
    """Accumulates, clips and steps, window by window.

    Attributes:
        in_update: whether an update is under way, or an error has left it half done.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        accumulator: GradientAccumulator,
        strategy: GradientStrategy,
        optimizer: AcceleratedOptimizer,
        schedule: LRScheduler,
        process_group: ProcessGroup,
        *,
        rate_factor: Callable[[int], float],
        max_grad_norm: float,
    ) -> None:
        """Create a loop.

        Args:
            strategy: what the accumulator sums gradients in.
            optimizer: prepared by Accelerate.
            schedule: not prepared by Accelerate, under which it would step once a process.
            rate_factor: returns the factor of the scheduled learning rate for the index of a window.
            max_grad_norm: infinity for no clipping.
        """
        self._accelerator, self._accumulator, self._strategy = accelerator, accumulator, strategy
        self._optimizer, self._schedule, self._process_group = optimizer, schedule, process_group
        self._rate_factor, self._max_grad_norm = rate_factor, max_grad_norm
        self._needs_closure = needs_closure(schedule.optimizer)
        self.in_update = False

    def train(self, windows: LocalWindows, before_update: BeforeUpdate, split: Split, on_step: OnStep) -> None:
        """Take one update for each window.

        Args:
            windows: this process's part of each window.
            before_update: called with each window, before anything is computed of it.
            split: called where memory runs out.
            on_step: called after each window.
        """
        self._accumulator.zero_gradients()  # whatever came with the model is not the first window's
        with self._strategy.accumulating():
            for window in windows:
                before_update(window)
                window, accumulated = self._accumulate(window, split)
                self.in_update = True
                windows.read_ahead()  # collate the next window while the device computes this one
                result, non_finite = self.update(window, accumulated, split)
                self.in_update = False
                on_step(result, non_finite)

    def update(
        self, window: LocalWindow, accumulated: AccumulatedWindow, split: Split
    ) -> tuple[StepResult, NonFiniteUpdate | None]:
        """Clip, step optimizer and schedule, and zero the gradients.

        The steps are skipped, and buffers restored, where the loss or the gradient is not finite, or the window has
        no loss items.
        """
        factor = self._rate_factor(window.window.index)
        rate = rate_in_use(self._schedule.optimizer, factor)
        gradient = self._clip(accumulated)
        skipped = not gradient.is_finite or not gradient.n_items > 0
        self._accumulator.observe_buffers(gradient.moved_buffers, undone=skipped)
        if not skipped:
            try:
                with scale_learning_rates(self._schedule.optimizer, factor):
                    self._step(window, accumulated, split)
                self._schedule.step()
            except NonFiniteStepError as error:
                gradient, skipped = error.gradient, True
        if skipped:
            self._skip(accumulated)
        self._accumulator.zero_gradients()
        rows = len(window.window.rows)
        result = StepResult(window.work, rows, accumulated.losses, gradient.norm, rate, skipped)
        if gradient.is_finite:
            return result, None
        return result, NonFiniteUpdate(
            update=window.window.index + 1,
            grad_norm=gradient.norm,
            loss=sum(gradient.losses),
            of_loss=gradient.of_loss,
            suspects=gradient.suspects,
            n_passes=len(gradient.losses),
            scale=None if self._accelerator.scaler is None else self._accelerator.scaler.get_scale(),
        )

    def _clip(self, accumulated: AccumulatedWindow) -> ClippedGradient:
        """Clip the gradient of a window, and return what decides whether to step."""
        # Accelerate's `clip_grad_norm_` fails for sharded weights in another order than the model's.
        self._accelerator.unscale_gradients()
        norm = _full(self._strategy.clip(self._max_grad_norm))
        # The one wait for the device in an update: all of these decide whether to step.
        grad_norm, n_items, losses, moved = accumulated.read_with(norm)
        passes = zip(accumulated.contributions, losses, strict=True)
        suspects = [micro for (micro, _), loss in passes if not math.isfinite(loss)]
        # The norm is the same on every process, losses and buffers are not.
        in_loss, *moved = self._process_group.any_of([bool(suspects), *moved])
        return ClippedGradient(grad_norm, n_items, losses, suspects, in_loss, moved)

    def _step(self, window: LocalWindow, accumulated: AccumulatedWindow, split: Split) -> None:
        """Have the optimizer step; one that evaluates the window again gets the same rows and the same random draws.

        What a step that fails has changed is put back. Buffers and generators end as the window's own passes left them.
        """
        if not self._needs_closure:
            self._optimizer.step()
            return

        def evaluate() -> ClippedGradient:
            nonlocal window
            self._accumulator.zero_gradients()
            accumulated.start.restore()
            window, again = self._accumulate(window, split)
            return self._clip(again)

        backup, end = OptimizerBackup(self._schedule.optimizer), accumulated.start.now()
        try:
            self._optimizer.step(closure_of(evaluate, lambda loss: sum(self._process_group.gather(loss))))
        except Exception:
            backup.restore()
            raise
        finally:
            end.restore()

    def _accumulate(self, window: LocalWindow, split: Split) -> tuple[LocalWindow, AccumulatedWindow]:
        """Accumulate a window, in smaller micro-batches as often as memory runs out. Return what fitted."""
        while True:
            try:
                return window, self._accumulator.accumulate(window.micro_batches)
            except WindowOutOfMemoryError as error:
                failed = error.failed
            give_back_memory()  # only now: the error's traceback holds the pass that failed
            window = split(window, failed)

    def _skip(self, accumulated: AccumulatedWindow) -> None:
        """Leave the run as it was before the window, but for the gradient scaler."""
        accumulated.start.buffers.restore()  # a NaN would stay in batch norm's running statistics for ever
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.update()  # the overflow was recorded when the gradients were unscaled


def _full(tensor: Tensor) -> Tensor:
    """Return a tensor that may be sharded as every process sees it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
