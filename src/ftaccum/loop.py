"""The loop: what happens to one window after another, in order."""

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

from .calibration import PassTimer
from .cutting import Slice
from .data import MicroBatch, Portion, Portions
from .embedding_gradients import EmbeddingGradients
from .history import Work
from .memory import Agreement, Failure, RanOutError, give_back_memory, is_out_of_memory
from .objective import Denominator, ItemMeans, Objective
from .optim import scaled_rates
from .planning import Window
from .side_effects import Buffers, Generators, buffers_of, in_mode, preserved_buffers, preserved_rng
from .wide_gradients import WindowGradients

# Hands over a window in smaller micro-batches, given the pass of this process that ran out of memory.
Smaller = Callable[[Portion, Failure | None], Portion]


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
        agreement: between processes, on whether a window fitted in memory.
        calibration: times passes.
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

    def train(self, portions: Portions, smaller: Smaller, on_window: Callable[[Outcome], None]) -> None:
        """One update for each window; of each, a portion is this process's."""
        self._zero_gradients()  # whatever came with the model is none of the first window's
        with self.gradients.summing():
            for portion in portions:
                work, losses, items = self._accumulate_in_memory(portion, smaller)
                portions.read_ahead()  # the next window is collated while the device computes this one
                on_window(self.update(portion.window, work, losses, items))

    def accumulate(self, share: list[MicroBatch]) -> tuple[ItemMeans, torch.Tensor]:
        """Leaves in `grad` of what the optimizer holds the gradient of the mean over all loss items of the window, on
        all processes.

        Returns:
            The losses of this share, and the window's loss items by term.

        Raises:
            RanOutError: on all processes, where memory ran out on one of them before the gradients were synced.
        """
        accelerator, losses = self.accelerator, ItemMeans(self.objective.terms, self.accelerator.device)
        denominator = Denominator([micro.counts for micro in share], self.objective.terms, accelerator)
        # All processes make as many passes, and the last one is synced.
        accelerator.gradient_accumulation_steps, accelerator.step = len(share), 0
        apart = self._apart(share)
        with self._tables.sparse():
            said = ((n, self._tried_pass(micro, denominator, losses)) for n, micro in enumerate(apart))
            failed = next((Failure(n, words) for n, words in said if words is not None), None)
        if apart and self.agreement.any(failed is not None):
            raise RanOutError(failed)
        self._tables.hand_over()
        for micro in share[len(apart) :]:
            self._synced_pass(micro, denominator, losses)
        self.gradients.reduce(self.agreement)
        return losses, denominator.items_T

    def update(self, window: Window, work: Work, losses: ItemMeans, items: torch.Tensor) -> Outcome:
        """Clips, steps optimizer and schedule, and zeroes the gradients; or only zeroes them, where the gradient is
        not finite or there was nothing to learn from."""
        factor = self.rate_factor(window.index)
        rate = float(self.schedule.optimizer.param_groups[0]["lr"]) * factor  # it may be a tensor
        # Accelerate's `clip_grad_norm_` stumbles over sharded weights in another order than the model's.
        self.accelerator.unscale_gradients()
        norm = _whole(nn.utils.clip_grad_norm_(self._held, self.max_grad_norm))
        # The one wait for the device in an update: both numbers decide, on every process alike.
        grad_norm, n_items = torch.stack([norm, items.sum().to(norm.device)]).tolist()
        skipped = not (n_items > 0 and grad_norm < float("inf"))
        if skipped and self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # the overflow was recorded when the gradients were unscaled
        if not skipped:
            with scaled_rates(self.schedule.optimizer, factor):
                self.optimizer.step()
            self.schedule.step()
        self._zero_gradients()
        return Outcome(work, len(window.rows), losses, grad_norm, rate, skipped)

    def _accumulate_in_memory(self, window: Portion, smaller: Smaller) -> tuple[Work, ItemMeans, torch.Tensor]:
        """`accumulate`, and again in smaller micro-batches as often as memory runs out, as if it never had."""
        if not self.agreement.alone:
            # DDP would do it in the first forward pass, which a process may leave before the others enter it.
            moving = (module._buffers[name] for module, name in self._moving)
            broadcast([buffer for buffer in moving if buffer is not None and buffer.is_contiguous()])
        generators, buffers = Generators.now(), Buffers.now(self._moving)
        while True:
            try:
                losses, items = self.accumulate(window.micro_batches)
            except RanOutError as error:
                failed = error.failed
            else:
                if self._first and self.agreement.any(not all(micro.is_ghost for micro in window.micro_batches)):
                    self._moving = [place for place in self._moving if self.agreement.any(buffers.moved(*place))]
                    self._first = False
                return window.work, losses, items
            self._zero_gradients()
            give_back_memory()
            generators.put_back()
            buffers.put_back()
            window = smaller(window, failed)

    def _apart(self, share: list[MicroBatch]) -> list[MicroBatch]:
        """The passes that a process can leave by itself: in the others it gathers weights or syncs gradients."""
        if self.agreement.alone or self.gradients.reduced_apart:
            return share
        return [] if isinstance(self.model, FSDPModule) else share[:-1]

    def _tried_pass(self, micro: MicroBatch, denominator: Denominator, losses: ItemMeans) -> str | None:
        """One pass. Returns what the device said where memory ran out in it."""
        try:
            with self.calibration.timing(Slice() if micro.is_ghost else micro.slice):
                self._pass(micro, denominator, losses)
                self._tables.collect()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return str(error)
        return None

    def _synced_pass(self, micro: MicroBatch, denominator: Denominator, losses: ItemMeans) -> None:
        try:
            self._pass(micro, denominator, losses)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise torch.OutOfMemoryError(
                "Memory ran out in a pass in which gradients are synced, or weights gathered: the other processes are "
                "in the middle of it, and none can go on. Lower `batch_size` or `max_tokens` (the size of an update "
                f"stays what it is), or use `gradient_checkpointing`. The device said: {error}"
            ) from error

    def _pass(self, micro: MicroBatch, denominator: Denominator, losses: ItemMeans) -> None:
        """One forward and backward pass. A ghost's is left out, unless other processes wait for it: weights that no row
        of the window uses would get a gradient of zeros, and optimizers move weights that have one."""
        accelerator = self.accelerator
        with accelerator.accumulate(self.model), self._without_trace(micro):
            if micro.is_ghost and not (accelerator.sync_gradients or isinstance(self.model, FSDPModule)):
                return
            batch = send_to_device(micro.batch, accelerator.device, non_blocking=True)
            # Not the outputs beside them: a name would keep the logits through the backward pass.
            means = self.objective.means(self.model, batch, micro.counts, micro.terms)[0]
            accelerator.backward(denominator.for_backward(denominator.contribution(means, micro.counts)))
        losses.add(means, micro.counts)

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
