"""The loop: what happens to one window after another, in order."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast, send_to_device
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

from ..data.loader import MicroBatch
from ..data.prefetch import LocalWindow, LocalWindows
from ..objective.normalizer import LossNormalizer, Means, WeightedMeans
from ..objective.objective import Objective
from ..planning.micro_batches import MicroBatchRows
from ..runtime.gradients.fp32 import GradientStrategy
from ..runtime.gradients.sparse import SparseEmbeddingGradients
from ..runtime.memory import FailedPass, WindowOutOfMemoryError, give_back_memory, is_out_of_memory
from ..runtime.process_group import ProcessGroup
from ..runtime.state_guards import Buffers, Generators, buffers_of, preserve_buffers, preserve_rng, training_mode
from ..tracking.throughput import Throughput
from .nonfinite import NonFiniteUpdate
from .optimizer import scale_learning_rates
from .pass_costs import PassTimer

_SMALL = 4096  # numbers of a buffer that is taken to move

# Hands over a window in smaller micro-batches, given the pass of this process that ran out of memory.
Smaller = Callable[[LocalWindow, FailedPass | None], LocalWindow]


@dataclass(frozen=True)
class AccumulatedWindow:
    """What the passes of this process's share left beside the gradient, on the device.

    Attributes:
        losses: of the share.
        items: the window's loss items by term, on all processes.
        parts: what each pass was of, and its part of the window's loss.
    """

    losses: WeightedMeans
    items: Tensor
    components: list[tuple[MicroBatch, Tensor]] = field(default_factory=list)

    def add(self, micro: MicroBatch, means: Means, contribution: Tensor) -> None:
        self.losses.add(means, micro.counts)
        self.components.append((micro, contribution.detach()))

    def read_with(self, norm: Tensor) -> tuple[float, float, list[float]]:
        """The gradient's norm, the number of loss items, and each pass's part of the loss, in one wait."""
        components = torch.stack([part for _, part in self.components])
        read = [norm.reshape(1), self.items.sum().reshape(1).to(norm.device), components.to(norm.device)]
        grad_norm, n_items, *found = torch.cat(read).tolist()
        return grad_norm, n_items, found


@dataclass(frozen=True)
class StepResult:
    """What a window came to. `losses` are this process's part, and stay on the device.

    Attributes:
        work: rows, positions and passes of this process.
        rows: of the window, on all processes.
        grad_norm: total norm before clipping, synced and unscaled.
        learning_rate: the one that the update used, or would have.
        skipped: whether no optimizer step was taken.
    """

    work: Throughput
    rows: int
    losses: WeightedMeans
    grad_norm: float
    learning_rate: float
    skipped: bool


@dataclass
class TrainingLoop:
    """What the loop works on, prepared by Accelerate but for the schedule: a prepared schedule would step once a
    process.

    Attributes:
        gradients: where a window's gradients are summed up.
        rate_factor: what the schedule's rate is multiplied by, by the index of the window.
        max_grad_norm: infinity for no clipping.
        agreement: between processes, on whether a window fitted in memory, and whether its loss is finite.
        calibration: times passes.
        in_update: whether an update is under way, or an error has left it half done.
    """

    accelerator: Accelerator
    model: nn.Module
    objective: Objective
    optimizer: AcceleratedOptimizer
    schedule: LRScheduler
    gradients: GradientStrategy
    rate_factor: Callable[[int], float]
    max_grad_norm: float
    process_group: ProcessGroup
    calibration: PassTimer
    in_update: bool = field(init=False, default=False)
    _held: list[nn.Parameter] = field(init=False)
    _not_held: list[nn.Parameter] = field(init=False)
    _tables: SparseEmbeddingGradients = field(init=False)
    _moving: list[tuple[nn.Module, str]] = field(init=False)  # buffers that passes move: all, until seen not to
    _first: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        self._held = [p for group in self.optimizer.param_groups for p in group["params"]]
        held = {id(p) for p in self._held}
        self._not_held = [p for p in self.model.parameters() if p.requires_grad and id(p) not in held]
        self._tables = SparseEmbeddingGradients(self.model)
        self._moving = buffers_of(self.model)

    def train(
        self,
        local_windows: LocalWindows,
        smaller: Smaller,
        on_window: Callable[[StepResult, NonFiniteUpdate | None], None],
    ) -> None:
        """One update for each window; of each, a portion is this process's."""
        self._zero_gradients()  # whatever came with the model is none of the first window's
        with self.gradients.summing():
            for local_window in local_windows:
                on_window(*self._window(local_window, local_windows, smaller))

    def accumulate(self, share: list[MicroBatch]) -> AccumulatedWindow:
        """Leaves in `grad` of what the optimizer holds the gradient of the mean over all loss items of the window, on
        all processes.

        Raises:
            RanOutError: on all processes, where memory ran out on one of them before the gradients were synced.
        """
        accelerator, terms = self.accelerator, self.objective.terms
        normalizer = LossNormalizer([micro.counts for micro in share], terms, accelerator)
        passes = AccumulatedWindow(WeightedMeans(terms, accelerator.device), normalizer.items_T)
        # All processes make as many passes, and the last one is synced.
        accelerator.gradient_accumulation_steps, accelerator.step = len(share), 0
        apart = self._apart(share)
        with self._tables.sparse():
            said = ((n, self._tried_pass(micro, normalizer, passes)) for n, micro in enumerate(apart))
            failed = next((FailedPass(n, words) for n, words in said if words is not None), None)
        if apart and self.process_group.any(failed is not None):
            raise WindowOutOfMemoryError(failed)
        self._tables.hand_over()
        for micro in share[len(apart) :]:
            self._synced_pass(micro, normalizer, passes)
        self.gradients.reduce(self.process_group)
        return passes

    def update(self, local_window: LocalWindow, passes: AccumulatedWindow) -> tuple[StepResult, NonFiniteUpdate | None]:
        """Clips, steps optimizer and schedule, and zeroes the gradients; or only zeroes them, where the loss or the
        gradient is not finite, or there was nothing to learn from."""
        window, scaler = local_window.window, self.accelerator.scaler
        factor = self.rate_factor(window.index)
        rate = float(self.schedule.optimizer.param_groups[0]["lr"]) * factor  # it may be a tensor
        # Accelerate's `clip_grad_norm_` stumbles over sharded weights in another order than the model's.
        self.accelerator.unscale_gradients()
        norm = _whole(nn.utils.clip_grad_norm_(self._held, self.max_grad_norm))
        # The one wait for the device in an update: all of these decide.
        grad_norm, n_items, components = passes.read_with(norm)
        suspects = [
            micro for (micro, _), part in zip(passes.components, components, strict=True) if not math.isfinite(part)
        ]
        of_loss = self.process_group.any(bool(suspects))  # the norm is the same on every process, losses are not
        faulty = of_loss or not math.isfinite(grad_norm)
        skipped = faulty or not n_items > 0
        if skipped and scaler is not None:
            scaler.update()  # the overflow was recorded when the gradients were unscaled
        if not skipped:
            with scale_learning_rates(self.schedule.optimizer, factor):
                self.optimizer.step()
            self.schedule.step()
        self._zero_gradients()
        outcome = StepResult(local_window.work, len(window.rows), passes.losses, grad_norm, rate, skipped)
        if not faulty:
            return outcome, None
        return outcome, NonFiniteUpdate(
            update=window.index + 1,
            grad_norm=grad_norm,
            loss=sum(components),
            of_loss=of_loss,
            suspects=suspects,
            n_passes=len(components),
            scale=None if scaler is None else scaler.get_scale(),
        )

    def _window(
        self, local_window: LocalWindow, local_windows: LocalWindows, smaller: Smaller
    ) -> tuple[StepResult, NonFiniteUpdate | None]:
        fitting, passes, buffers = self._accumulate_in_memory(local_window, smaller)
        self.in_update = True
        local_windows.read_ahead()  # the next window is collated while the device computes this one
        outcome, fault = self.update(fitting, passes)
        if outcome.skipped:
            buffers.restore()  # a NaN would stay in batch norm's running statistics for ever
        self.in_update = False
        return outcome, fault

    def sync_buffers(self) -> None:
        """Has all processes' buffers be those of the main one. DDP would do it in the first forward pass, which a
        process may leave before the others enter it."""
        if not self.process_group.is_single:
            moving = (module._buffers[name] for module, name in self._moving)
            found = [buffer for buffer in moving if buffer is not None and buffer.is_contiguous()]
            for dtype in {buffer.dtype: None for buffer in found}:  # in one collective each
                same = [buffer for buffer in found if buffer.dtype == dtype]
                everything = broadcast(torch.cat([buffer.flatten() for buffer in same]))
                for buffer, values in zip(same, everything.split([b.numel() for b in same]), strict=True):
                    buffer.copy_(values.view_as(buffer))

    def _accumulate_in_memory(
        self, local_window: LocalWindow, smaller: Smaller
    ) -> tuple[LocalWindow, AccumulatedWindow, Buffers]:
        """`accumulate`, and again in smaller micro-batches as often as memory runs out, as if it never had. Returns the
        micro-batches that fitted, what their passes left, and the buffers that the window began with."""
        self.sync_buffers()
        generators, buffers = Generators.now(), Buffers.now(self._moving)
        while True:
            try:
                passes = self.accumulate(local_window.micro_batches)
            except WindowOutOfMemoryError as error:
                failed = error.failed
            except Exception:  # the run is as it was after the update before
                self._zero_gradients()
                generators.restore()
                buffers.restore()
                raise
            else:
                self._see_what_moves(buffers, local_window)
                return local_window, passes, buffers
            self._zero_gradients()
            give_back_memory()
            generators.restore()
            buffers.restore()
            local_window = smaller(local_window, failed)

    def _see_what_moves(self, buffers: Buffers, local_window: LocalWindow) -> None:
        """In the first window that has rows, which of the large buffers passes move. Small ones are taken to move in
        any case: batch norm in a branch that was not taken, or an average that begins later, may begin to."""
        if self._first and self.process_group.any(not all(micro.is_dummy for micro in local_window.micro_batches)):
            found = ((place, buffer.numel() <= _SMALL) for place, (buffer, _) in buffers.kept.items())
            self._moving = [
                place for place, extra_state in found if extra_state or self.process_group.any(buffers.moved(*place))
            ]
            self._first = False

    def _apart(self, share: list[MicroBatch]) -> list[MicroBatch]:
        """The passes that a process can leave by itself: in the others it gathers weights or syncs gradients."""
        if self.process_group.is_single or self.gradients.reduced_apart:
            return share
        return [] if isinstance(self.model, FSDPModule) else share[:-1]

    def _tried_pass(self, micro: MicroBatch, normalizer: LossNormalizer, passes: AccumulatedWindow) -> str | None:
        """One pass. Returns what the device said where memory ran out in it."""
        try:
            with self.calibration.timing(MicroBatchRows() if micro.is_dummy else micro.slice):
                self._pass(micro, normalizer, passes)
                self._tables.collect()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return str(error)
        return None

    def _synced_pass(self, micro: MicroBatch, normalizer: LossNormalizer, passes: AccumulatedWindow) -> None:
        try:
            self._pass(micro, normalizer, passes)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise torch.OutOfMemoryError(
                "Memory ran out in a pass in which gradients are synced, or weights gathered: the other processes are "
                "in the middle of it, and none can go on. Lower `batch_size` or `max_tokens` (the size of an update "
                f"stays what it is), or use `gradient_checkpointing`. The device said: {error}"
            ) from error

    def _pass(self, micro: MicroBatch, normalizer: LossNormalizer, passes: AccumulatedWindow) -> None:
        """One forward and backward pass. A ghost's is left out, unless other processes wait for it: weights that no row
        of the window uses would get a gradient of zeros, and optimizers move weights that have one."""
        accelerator = self.accelerator
        with accelerator.accumulate(self.model), self._leave_no_trace(micro):
            if micro.is_dummy and not (accelerator.sync_gradients or isinstance(self.model, FSDPModule)):
                return
            batch = send_to_device(micro.batch, accelerator.device, non_blocking=True)
            # Not the outputs beside them: a name would keep the logits through the backward pass.
            means = self.objective.means(self.model, batch, micro.counts, micro.terms)[0]
            contribution = normalizer.contribution(means, micro.counts)
            accelerator.backward(normalizer.for_backward(contribution))
        passes.add(micro, means, contribution)

    def _zero_gradients(self) -> None:
        self._tables.drop()
        for p in (*self._held, *self._not_held):
            p.grad = None

    def _leave_no_trace(self, micro: MicroBatch) -> ExitStack:
        stack = ExitStack()
        if micro.is_dummy:
            stack.enter_context(preserve_rng())
            stack.enter_context(preserve_buffers(self.model))
            if self.objective.report.in_training.complaint is not None:  # of a single row, as a ghost is
                stack.enter_context(training_mode(self.model, training=False))
        return stack


def _whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, as every process is to see it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
