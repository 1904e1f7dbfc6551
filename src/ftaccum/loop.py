"""The loop: what happens to one window after another, in order."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import send_to_device
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from .data import MicroBatch
from .objective import Denominator, ItemMeans, Objective
from .side_effects import preserved_buffers, preserved_rng


@dataclass(frozen=True)
class Outcome:
    """What a window came to. `losses` are this process's part, and stay on the device.

    Attributes:
        grad_norm: total norm before clipping, synced and unscaled.
        learning_rate: the one that the update used, or would have.
        skipped: whether no optimizer step was taken.
    """

    losses: ItemMeans
    grad_norm: float
    learning_rate: float
    skipped: bool


@dataclass
class TrainingLoop:
    """What the loop works on, prepared by Accelerate but for the schedule: a prepared schedule would step once a
    process.

    Attributes:
        max_grad_norm: infinity for no clipping.
    """

    accelerator: Accelerator
    model: nn.Module
    objective: Objective
    optimizer: AcceleratedOptimizer
    schedule: LRScheduler
    max_grad_norm: float
    _held: list[nn.Parameter] = field(init=False)
    _not_held: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self._held = [p for group in self.optimizer.param_groups for p in group["params"]]
        held = {id(p) for p in self._held}
        self._not_held = [p for p in self.model.parameters() if p.requires_grad and id(p) not in held]

    def train(self, windows: Iterable[list[MicroBatch]], on_window: Callable[[Outcome], None]) -> None:
        """One update for each window; each window is this process's share of it."""
        self.model.zero_grad(set_to_none=True)  # whatever came with the model is none of the first window's
        for share in windows:
            losses, items = self.accumulate(share)
            on_window(self.update(losses, items))

    def accumulate(self, share: list[MicroBatch]) -> tuple[ItemMeans, torch.Tensor]:
        """Leaves in `param.grad` the gradient of the mean over all loss items of the window, on all processes.

        Returns:
            The losses of this share, and the window's loss items by term.
        """
        accelerator, losses = self.accelerator, ItemMeans(self.objective.terms, self.accelerator.device)
        denominator = Denominator([micro.counts for micro in share], self.objective.terms, accelerator)
        # All processes make as many passes, and the last one is synced.
        accelerator.gradient_accumulation_steps, accelerator.step = len(share), 0
        for micro in share:
            with accelerator.accumulate(self.model), self._without_trace(micro):
                batch = send_to_device(micro.batch, accelerator.device, non_blocking=True)
                means, _ = self.objective.means(self.model, batch, micro.counts, micro.terms)
                accelerator.backward(denominator.for_backward(denominator.contribution(means, micro.counts)))
            losses.add(means, micro.counts)
        return losses, denominator.items_T

    def update(self, losses: ItemMeans, items: torch.Tensor) -> Outcome:
        """Clips, steps optimizer and schedule, and zeroes the gradients; or only zeroes them, where the gradient is
        not finite or there was nothing to learn from."""
        rate = self.optimizer.param_groups[0]["lr"]
        norm = self.accelerator.clip_grad_norm_(self._held, self.max_grad_norm)
        # The one wait for the device in an update: both numbers decide, on every process alike.
        grad_norm, n_items = torch.stack([norm, items.sum().to(norm.device)]).tolist()
        skipped = not (n_items > 0 and grad_norm < float("inf"))
        if skipped and self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # the overflow was recorded when the gradients were unscaled
        if not skipped:
            self.optimizer.step()
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        for p in self._not_held:
            p.grad = None
        return Outcome(losses, grad_norm, rate, skipped)

    def _without_trace(self, micro: MicroBatch) -> ExitStack:
        stack = ExitStack()
        if micro.is_ghost:
            stack.enter_context(preserved_rng())
            stack.enter_context(preserved_buffers(self.model))
        return stack
