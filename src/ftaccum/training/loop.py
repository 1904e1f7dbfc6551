"""The training loop: accumulates, clips and steps, window by window."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim.lr_scheduler import LRScheduler

from ..accumulation.accumulator import GradientAccumulator
from ..accumulation.window import AccumulatedWindow
from ..data.prefetch import LocalWindow, LocalWindows
from ..errors import InexactLossError
from ..runtime.device_state import is_idle, peak_memory
from ..runtime.gradients.plain import GradientStrategy
from ..runtime.memory import FailedPass, WindowOutOfMemoryError, give_back_memory
from ..runtime.optimizers import OptimizerBackup
from ..runtime.process_group import ProcessGroup
from ..tracking.phase_timer import PhaseTimer
from ..tracking.step import StepResult
from .closure import ClippedGradient, NonFiniteStepError, closure_of, needs_closure
from .nonfinite import NonFiniteUpdate
from .rates import rate_in_use, scale_learning_rates
from .schedule import cover_new_groups

_PASSES_DIFFER = (
    "With `loss_over='window'` or `router_balance='window'`, each micro-batch runs twice, and both passes must give "
    "the same outputs. {place} they differ by {drift} (relative); up to {most} counts as rounding. The gradient of "
    "this update would be wrong, so ftaccum does not make the update. Something in the forward pass draws random "
    "numbers that ftaccum does not replay, or depends on how often it has run, such as a counter in `forward`."
)


class PassesDifferError(InexactLossError):
    """The two passes over a window differ. Its update is not made, whatever `on_inexact` is."""


# Returns a window in smaller micro-batches, given the pass of this process that ran out of memory, if one did.
Split = Callable[[LocalWindow, FailedPass | None], LocalWindow]


@dataclass(frozen=True)
class LoopHooks:
    """The functions that a loop calls.

    Attributes:
        split: called if memory runs out.
        before_update: called with each window before its first pass; returns it, with its loss items counted again if
            they may have changed.
        after_update: called after each window, with its result; returns whether to take another one.
        before_step: called before each optimizer step, with the gradient clipped.
        after_step: called after each optimizer step, before the gradient is dropped.
    """

    split: Split
    before_update: Callable[[LocalWindow], LocalWindow]
    after_update: Callable[[StepResult, NonFiniteUpdate | None], bool]
    before_step: Callable[[], None] = lambda: None
    after_step: Callable[[], None] = lambda: None


class TrainingLoop:
    """Takes one update per window: accumulates its gradient, clips it and steps.

    Attributes:
        in_update: whether an update is in progress, or an error has interrupted it.
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
            strategy: sums the gradients for the accumulator.
            optimizer: the optimizer, prepared by Accelerate.
            schedule: the schedule, not prepared by Accelerate, which would step it once per process.
            rate_factor: returns the factor of the scheduled learning rate for the window with the given index.
            max_grad_norm: the norm to clip gradients to; infinity for no clipping.
        """
        self._accelerator, self._accumulator, self._strategy = accelerator, accumulator, strategy
        self._optimizer, self._schedule, self._process_group = optimizer, schedule, process_group
        self._rate_factor, self._max_grad_norm = rate_factor, max_grad_norm
        self._needs_closure = needs_closure(schedule.optimizer)
        self._timer = PhaseTimer()
        self.in_update = False

    def train(self, windows: LocalWindows, hooks: LoopHooks) -> None:
        """Take one update for each window.

        Args:
            windows: this process's part of each window.
            hooks: the functions to call in between.
        """
        self._accumulator.zero_gradients()  # the model may have come with gradients
        with self._strategy.accumulating():
            while (window := self._next(windows)) is not None:
                window, accumulated = self._accumulate(hooks.before_update(window), hooks.split)
                self.in_update = True
                self._read_ahead(windows)
                result, non_finite = self._update(window, accumulated, hooks)
                self.in_update = False
                if not hooks.after_update(result, non_finite):
                    return

    def _next(self, windows: LocalWindows) -> LocalWindow | None:
        with self._timer.phase("data"):
            return next(windows, None)

    def _read_ahead(self, windows: LocalWindows) -> None:
        """Collate the next window while the device computes this one."""
        with self._timer.phase("data"):
            windows.read_ahead()
            if not is_idle(self._accelerator.device):  # it did not wait for rows
                self._timer.count_as("passes")

    def _update(
        self, window: LocalWindow, accumulated: AccumulatedWindow, hooks: LoopHooks
    ) -> tuple[StepResult, NonFiniteUpdate | None]:
        """Clip the gradient, step the optimizer and the schedule, and drop the gradients.

        Skip both steps and restore buffers if the loss or the gradient is not finite, or if the window has no loss
        items.

        Returns:
            The result of the update, and a description of what was not finite, or None.
        """
        factor = self._rate_factor(window.window.index)
        cover_new_groups(self._schedule)
        rate = rate_in_use(self._schedule.optimizer, factor)
        gradient = self._clip(accumulated)
        skipped = not gradient.is_finite or not gradient.n_items > 0
        self._accumulator.observe_buffers(gradient.moved_buffers, undone=skipped)
        if not skipped:
            try:
                hooks.before_step()
                cover_new_groups(self._schedule)
                rate = rate_in_use(self._schedule.optimizer, factor)  # a hook may set another one
                with self._timer.phase("optimizer"), scale_learning_rates(self._schedule.optimizer, factor):
                    self._step(window, accumulated, hooks.split)
                hooks.after_step()
                cover_new_groups(self._schedule)
                with self._timer.phase("optimizer"):
                    self._schedule.step()
            except NonFiniteStepError as error:
                gradient, skipped = error.gradient, True
        if skipped:
            self._skip(accumulated)
        self._accumulator.zero_gradients()
        result = StepResult(
            work=window.work.with_passes(accumulated.forward_passes),
            rows=len(window.window.rows),
            losses=accumulated.losses,
            grad_norm=gradient.norm,
            learning_rate=rate,
            skipped=skipped,
            clip_coefficient=_clip_coefficient(gradient.norm, self._max_grad_norm),
            seconds=self._timer.take(),
            peak_memory=peak_memory(self._accelerator.device),
            noise=gradient.noise,
        )
        return result, self._non_finite(window, gradient)

    def _non_finite(self, window: LocalWindow, gradient: ClippedGradient) -> NonFiniteUpdate | None:
        """Return a description of an update whose loss or gradient is not finite; None if both are."""
        if gradient.is_finite:
            return None
        return NonFiniteUpdate(
            update=window.window.index + 1,
            grad_norm=gradient.norm,
            loss=sum(gradient.losses),
            of_loss=gradient.of_loss,
            suspects=gradient.suspects,
            n_passes=len(gradient.losses),
            scale=None if self._accelerator.scaler is None else self._accelerator.scaler.get_scale(),
        )

    def _clip(self, accumulated: AccumulatedWindow) -> ClippedGradient:
        """Clip the gradient of a window, and return the numbers that decide whether to step."""
        with self._timer.phase("passes"):
            self._accelerator.unscale_gradients()
            norm = self._strategy.clip(self._max_grad_norm)
            # The only wait for the device in an update: these numbers decide whether to step.
            numbers = accumulated.read_with(norm)
        passes = zip(accumulated.contributions, numbers.losses, strict=True)
        suspects = [micro for (micro, _), loss in passes if not math.isfinite(loss)]
        # The norm is the same on every process, but losses, outputs and buffers are not.
        has_drifted = numbers.drift > accumulated.most_drift
        in_loss, any_drifted, *moved = self._process_group.any_of([bool(suspects), has_drifted, *numbers.moved_buffers])
        if any_drifted:
            self._abandon(accumulated, numbers.drift)
        return ClippedGradient(
            norm=numbers.grad_norm,
            n_items=numbers.n_items,
            losses=numbers.losses,
            suspects=suspects,
            of_loss=in_loss,
            moved_buffers=moved,
            noise=numbers.noise,
        )

    def _abandon(self, accumulated: AccumulatedWindow, drift: float) -> None:
        """Restore the state before a window whose two passes differ, and raise PassesDifferError."""
        accumulated.start.restore()
        self._accumulator.zero_gradients()
        self.in_update = False
        drifts = self._process_group.gather(drift)
        worst = max(range(len(drifts)), key=drifts.__getitem__)
        place = "Here" if len(drifts) == 1 else f"On process {worst}"
        message = _PASSES_DIFFER.format(place=place, drift=f"{drifts[worst]:.1e}", most=f"{accumulated.most_drift:.0e}")
        raise PassesDifferError([message])

    def _step(self, window: LocalWindow, accumulated: AccumulatedWindow, split: Split) -> None:
        """Step the optimizer; if it needs a closure, let it evaluate the same rows again with the same random draws.

        Buffers and random number generators end as the window's first evaluation left them. If a step with a closure
        fails, restore the weights and the optimizer; if two passes differ, the whole state before the window.
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
        except Exception as error:
            backup.restore()
            end = accumulated.start if isinstance(error, PassesDifferError) else end
            raise
        finally:
            end.restore()

    def _accumulate(self, window: LocalWindow, split: Split) -> tuple[LocalWindow, AccumulatedWindow]:
        """Accumulate a window, and return it with the result. Retry in smaller micro-batches while memory runs out."""
        while True:
            try:
                with self._timer.phase("passes"):
                    micro_batches, n_first = window.micro_batches, window.n_first
                    return window, self._accumulator.accumulate(micro_batches, seed=window.seed, n_first=n_first)
            except WindowOutOfMemoryError as error:
                failed = error.failed
            give_back_memory()  # outside the handler, where the error's traceback still held the failed pass
            window = split(window, failed)

    def _skip(self, accumulated: AccumulatedWindow) -> None:
        """Restore buffers to their state before the window, and update the gradient scaler."""
        accumulated.start.buffers.restore()  # a NaN would stay in batch norm's running statistics forever
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.update()  # the overflow was recorded when the gradients were unscaled


def _clip_coefficient(norm: float, max_norm: float) -> float:
    """Return the factor by which clipping multiplied a gradient, as torch computes it; NaN if it is not finite."""
    return min(1.0, max_norm / (norm + 1e-6)) if math.isfinite(norm) else math.nan
