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
from ..data.prefetch import Portion, Portions
from ..objective.normalizer import Denominator, ItemMeans, Means
from ..objective.objective import Objective
from ..planning.micro_batches import Slice
from ..runtime.gradients.fp32 import WindowGradients
from ..runtime.gradients.sparse import EmbeddingGradients
from ..runtime.memory import Agreement, Failure, RanOutError, give_back_memory, is_out_of_memory
from ..runtime.state_guards import Buffers, Generators, buffers_of, in_mode, preserved_buffers, preserved_rng
from ..tracking.throughput import Work
from .nonfinite import Fault
from .optimizer import scaled_rates
from .pass_costs import PassTimer

_SMALL = 4096  # numbers of a buffer that is taken to move

# Hands over a window in smaller micro-batches, given the pass of this process that ran out of memory.
Smaller = Callable[[Portion, Failure | None], Portion]


@dataclass(frozen=True)
class Passes:
    """What the passes of this process's share left beside the gradient, on the device.

    Attributes:
        losses: of the share.
        items: the window's loss items by term, on all processes.
        parts: what each pass was of, and its part of the window's loss.
    """

    losses: ItemMeans
    items: Tensor
    parts: list[tuple[MicroBatch, Tensor]] = field(default_factory=list)

    def add(self, micro: MicroBatch, means: Means, contribution: Tensor) -> None:
        self.losses.add(means, micro.counts)
        self.parts.append((micro, contribution.detach()))

    def read_with(self, norm: Tensor) -> tuple[float, float, list[float]]:
        """The gradient's norm, the number of loss items, and each pass's part of the loss, in one wait."""
        parts = torch.stack([part for _, part in self.parts])
        read = [norm.reshape(1), self.items.sum().reshape(1).to(norm.device), parts.to(norm.device)]
        grad_norm, n_items, *found = torch.cat(read).tolist()
        return grad_norm, n_items, found


@dataclass(frozen=True)
class Outcome:
    """What a window came to. `losses` are this process's part, and stay on the device.

    Attributes:
        work: rows, positions and passes of this process.
        rows: of the window, on all processes.
        grad_norm: total norm before clipping, synced and unscaled.
        learning_rate: the one that the update used, or would have.
        skipped: whether no optimizer step was taken.
    """

    work: Work
    rows: int
    losses: ItemMeans
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
    gradients: WindowGradients
    rate_factor: Callable[[int], float]
    max_grad_norm: float
    agreement: Agreement
    calibration: PassTimer
    in_update: bool = field(init=False, default=False)
    _held: list[nn.Parameter] = field(init=False)
    _not_held: list[nn.Parameter] = field(init=False)
    _tables: EmbeddingGradients = field(init=False)
    _moving: list[tuple[nn.Module, str]] = field(init=False)  # buffers that passes move: all, until seen not to
    _first: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        self._held = [p for group in self.optimizer.param_groups for p in group["params"]]
        held = {id(p) for p in self._held}
        self._not_held = [p for p in self.model.parameters() if p.requires_grad and id(p) not in held]
        self._tables = EmbeddingGradients(self.model)
        self._moving = buffers_of(self.model)

    def train(self, portions: Portions, smaller: Smaller, on_window: Callable[[Outcome, Fault | None], None]) -> None:
        """One update for each window; of each, a portion is this process's."""
        self._zero_gradients()  # whatever came with the model is none of the first window's
        with self.gradients.summing():
            for portion in portions:
                on_window(*self._window(portion, portions, smaller))

    def accumulate(self, share: list[MicroBatch]) -> Passes:
        """Leaves in `grad` of what the optimizer holds the gradient of the mean over all loss items of the window, on
        all processes.

        Raises:
            RanOutError: on all processes, where memory ran out on one of them before the gradients were synced.
        """
        accelerator, terms = self.accelerator, self.objective.terms
        denominator = Denominator([micro.counts for micro in share], terms, accelerator)
        passes = Passes(ItemMeans(terms, accelerator.device), denominator.items_T)
        # All processes make as many passes, and the last one is synced.
        accelerator.gradient_accumulation_steps, accelerator.step = len(share), 0
        apart = self._apart(share)
        with self._tables.sparse():
            said = ((n, self._tried_pass(micro, denominator, passes)) for n, micro in enumerate(apart))
            failed = next((Failure(n, words) for n, words in said if words is not None), None)
        if apart and self.agreement.any(failed is not None):
            raise RanOutError(failed)
        self._tables.hand_over()
        for micro in share[len(apart) :]:
            self._synced_pass(micro, denominator, passes)
        self.gradients.reduce(self.agreement)
        return passes

    def update(self, portion: Portion, passes: Passes) -> tuple[Outcome, Fault | None]:
        """Clips, steps optimizer and schedule, and zeroes the gradients; or only zeroes them, where the loss or the
        gradient is not finite, or there was nothing to learn from."""
        window, scaler = portion.window, self.accelerator.scaler
        factor = self.rate_factor(window.index)
        rate = float(self.schedule.optimizer.param_groups[0]["lr"]) * factor  # it may be a tensor
        # Accelerate's `clip_grad_norm_` stumbles over sharded weights in another order than the model's.
        self.accelerator.unscale_gradients()
        norm = _whole(nn.utils.clip_grad_norm_(self._held, self.max_grad_norm))
        # The one wait for the device in an update: all of these decide.
        grad_norm, n_items, parts = passes.read_with(norm)
        suspects = [micro for (micro, _), part in zip(passes.parts, parts, strict=True) if not math.isfinite(part)]
        of_loss = self.agreement.any(bool(suspects))  # the norm is the same on every process, losses are not
        faulty = of_loss or not math.isfinite(grad_norm)
        skipped = faulty or not n_items > 0
        if skipped and scaler is not None:
            scaler.update()  # the overflow was recorded when the gradients were unscaled
        if not skipped:
            with scaled_rates(self.schedule.optimizer, factor):
                self.optimizer.step()
            self.schedule.step()
        self._zero_gradients()
        outcome = Outcome(portion.work, len(window.rows), passes.losses, grad_norm, rate, skipped)
        if not faulty:
            return outcome, None
        return outcome, Fault(
            update=window.index + 1,
            grad_norm=grad_norm,
            loss=sum(parts),
            of_loss=of_loss,
            suspects=suspects,
            n_passes=len(parts),
            scale=None if scaler is None else scaler.get_scale(),
        )

    def _window(self, portion: Portion, portions: Portions, smaller: Smaller) -> tuple[Outcome, Fault | None]:
        fitting, passes, buffers = self._accumulate_in_memory(portion, smaller)
        self.in_update = True
        portions.read_ahead()  # the next window is collated while the device computes this one
        outcome, fault = self.update(fitting, passes)
        if outcome.skipped:
            buffers.put_back()  # a NaN would stay in batch norm's running statistics for ever
        self.in_update = False
        return outcome, fault

    def sync_buffers(self) -> None:
        """Has all processes' buffers be those of the main one. DDP would do it in the first forward pass, which a
        process may leave before the others enter it."""
        if not self.agreement.alone:
            moving = (module._buffers[name] for module, name in self._moving)
            found = [buffer for buffer in moving if buffer is not None and buffer.is_contiguous()]
            for dtype in {buffer.dtype: None for buffer in found}:  # in one collective each
                same = [buffer for buffer in found if buffer.dtype == dtype]
                everything = broadcast(torch.cat([buffer.flatten() for buffer in same]))
                for buffer, values in zip(same, everything.split([b.numel() for b in same]), strict=True):
                    buffer.copy_(values.view_as(buffer))

    def _accumulate_in_memory(self, portion: Portion, smaller: Smaller) -> tuple[Portion, Passes, Buffers]:
        """`accumulate`, and again in smaller micro-batches as often as memory runs out, as if it never had. Returns the
        micro-batches that fitted, what their passes left, and the buffers that the window began with."""
        self.sync_buffers()
        generators, buffers = Generators.now(), Buffers.now(self._moving)
        while True:
            try:
                passes = self.accumulate(portion.micro_batches)
            except RanOutError as error:
                failed = error.failed
            except Exception:  # the run is as it was after the update before
                self._zero_gradients()
                generators.put_back()
                buffers.put_back()
                raise
            else:
                self._see_what_moves(buffers, portion)
                return portion, passes, buffers
            self._zero_gradients()
            give_back_memory()
            generators.put_back()
            buffers.put_back()
            portion = smaller(portion, failed)

    def _see_what_moves(self, buffers: Buffers, portion: Portion) -> None:
        """In the first window that has rows, which of the large buffers passes move. Small ones are taken to move in
        any case: batch norm in a branch that was not taken, or an average that begins later, may begin to."""
        if self._first and self.agreement.any(not all(micro.is_ghost for micro in portion.micro_batches)):
            found = ((place, buffer.numel() <= _SMALL) for place, (buffer, _) in buffers.kept.items())
            self._moving = [place for place, small in found if small or self.agreement.any(buffers.moved(*place))]
            self._first = False

    def _apart(self, share: list[MicroBatch]) -> list[MicroBatch]:
        """The passes that a process can leave by itself: in the others it gathers weights or syncs gradients."""
        if self.agreement.alone or self.gradients.reduced_apart:
            return share
        return [] if isinstance(self.model, FSDPModule) else share[:-1]

    def _tried_pass(self, micro: MicroBatch, denominator: Denominator, passes: Passes) -> str | None:
        """One pass. Returns what the device said where memory ran out in it."""
        try:
            with self.calibration.timing(Slice() if micro.is_ghost else micro.slice):
                self._pass(micro, denominator, passes)
                self._tables.collect()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return str(error)
        return None

    def _synced_pass(self, micro: MicroBatch, denominator: Denominator, passes: Passes) -> None:
        try:
            self._pass(micro, denominator, passes)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise torch.OutOfMemoryError(
                "Memory ran out in a pass in which gradients are synced, or weights gathered: the other processes are "
                "in the middle of it, and none can go on. Lower `batch_size` or `max_tokens` (the size of an update "
                f"stays what it is), or use `gradient_checkpointing`. The device said: {error}"
            ) from error

    def _pass(self, micro: MicroBatch, denominator: Denominator, passes: Passes) -> None:
        """One forward and backward pass. A ghost's is left out, unless other processes wait for it: weights that no row
        of the window uses would get a gradient of zeros, and optimizers move weights that have one."""
        accelerator = self.accelerator
        with accelerator.accumulate(self.model), self._without_trace(micro):
            if micro.is_ghost and not (accelerator.sync_gradients or isinstance(self.model, FSDPModule)):
                return
            batch = send_to_device(micro.batch, accelerator.device, non_blocking=True)
            # Not the outputs beside them: a name would keep the logits through the backward pass.
            means = self.objective.means(self.model, batch, micro.counts, micro.terms)[0]
            contribution = denominator.contribution(means, micro.counts)
            accelerator.backward(denominator.for_backward(contribution))
        passes.add(micro, means, contribution)

    def _zero_gradients(self) -> None:
        self._tables.drop()
        for p in (*self._held, *self._not_held):
            p.grad = None

    def _without_trace(self, micro: MicroBatch) -> ExitStack:
        stack = ExitStack()
        if micro.is_ghost:
            stack.enter_context(preserved_rng())
            stack.enter_context(preserved_buffers(self.model))
            if self.objective.findings.in_training.complaint is not None:  # of a single row, as a ghost is
                stack.enter_context(in_mode(self.model, training=False))
        return stack


def _whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, as every process is to see it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
