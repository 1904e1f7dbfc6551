"""The gradient of all rows of an audit in one batch, without weights: what accumulation must equal."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..data.loader import MicroBatch
from ..objective.batch_changes import fresh_batch
from ..objective.normalizer import widened
from ..objective.objective import Objective
from ..runtime.accumulation_backend import AccumulationBackend
from ..runtime.device_state import peak_memory
from ..runtime.gradients.plain import GradientStrategy
from ..runtime.memory import free_memory, is_out_of_memory
from ..runtime.process_group import ProcessGroup
from .audit_sample import AuditSample

T = TypeVar("T")

# The maximum size of one batch, in micro-batches. The attention over packed rows grows with the square of their length.
_LARGEST, _LARGEST_PACKED = 8, 4


class OneBatch:
    """Runs one batch on the main process alone or, if the weights are sharded, on all processes together."""

    def __init__(
        self,
        accelerator: AccumulationBackend,
        model: nn.Module,
        objective: Objective,
        strategy: GradientStrategy,
        process_group: ProcessGroup,
    ) -> None:
        """Args:
        model: the model, not wrapped for several processes.
        """
        self._accelerator, self._model, self._objective = accelerator, model, objective
        self._strategy, self._process_group = strategy, process_group

    def fits(self, sample: AuditSample) -> bool:
        """Return whether to try one batch, the same on all processes."""
        if not self._strategy.gathers_weights:
            return self._process_group.run_on_main(lambda: self._has_memory(sample))
        return not self._process_group.any(not self._has_memory(sample))

    def _has_memory(self, sample: AuditSample) -> bool:
        """Return whether this process may try. On an accelerator, trying is safe; on a CPU, it could be killed."""
        times, device = sample.times_largest, self._accelerator.device
        if times > (_LARGEST_PACKED if sample.is_packed else _LARGEST):
            return False
        # Processes that gather weights cannot recover if memory runs out in the backward pass of one of them.
        if device.type != "cpu" and not self._strategy.gathers_weights:
            return True
        # The peak memory is an upper bound for each micro-batch so far.
        return times * peak_memory(device) < free_memory(device)

    def loss(self, micro: MicroBatch) -> Tensor:
        """Return the mean loss of a batch, as the model or the loss function computes it."""
        batch = fresh_batch(micro.batch, self._accelerator.device)
        return self._objective.unweighted_loss(self._model, batch, micro.counts, micro.slice.places)

    def numbers(self, micro: MicroBatch) -> dict[str, float]:
        """Return numbers by which two passes of a batch can be compared: its loss.

        A loss over a window may not take these rows alone, so of such a loss they are the norms of what it reads.
        """
        if self._objective.window is None:
            return {"loss": self.loss(micro).item()}
        batch = fresh_batch(micro.batch, self._accelerator.device)
        means, values, _ = self._objective.observe(self._model, batch, micro.counts, micro.terms, micro.names)
        return {name: widened(number).norm().item() for name, number in {**means, **values}.items()}

    def run_on_main(self, function: Callable[[], T]) -> T:
        """Call a function that runs passes without gradients on the main process; return its result on all."""
        if not self._strategy.gathers_weights:
            return self._process_group.run_on_main(function)
        result: list[T] = []
        with self._strategy.independent_passes(), torch.no_grad():
            if self._process_group.is_main:
                result.append(function())
        return self._process_group.broadcast(result)[0]

    def gradient(self, sample: AuditSample | None, factor: float) -> tuple[float, Sequence[Tensor | None]] | None:
        """Return the loss of one batch, and its gradient for each of the strategy's weights.

        Both are None on processes that do not run the batch, and everywhere if memory runs out or there is no batch.

        Args:
            sample: the rows in one micro-batch; None on processes other than the main one, which must not load it.
            factor: multiplies the loss, and so the gradient.
        """
        if self._strategy.gathers_weights:
            return self._gradient_of_all(sample, factor)
        found: list[tuple[float, Sequence[Tensor | None]]] = []

        def on_main() -> None:
            if sample is not None and (gradient := self._gradient_of_main(sample, factor)) is not None:
                found.append(gradient)

        self._process_group.run_on_main(on_main)
        return found[0] if found else None

    def _gradient_of_main(self, sample: AuditSample, factor: float) -> tuple[float, Sequence[Tensor | None]] | None:
        (micro,) = sample.load()
        try:
            loss = self.loss(micro)
            return loss.item(), self._backward(self._scaled(loss * factor))
        except RuntimeError as error:
            if self._process_group.is_single and not is_out_of_memory(error):
                raise
            return None

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self._accelerator.scaler is None else self._accelerator.scaler.scale(loss)

    def _backward(self, loss: Tensor) -> Sequence[Tensor | None]:
        """Run the backward pass. On several processes, do not call `backward`, which would trigger DDP's hooks."""
        weights = self._strategy.weights
        if not loss.requires_grad:  # it may be a constant
            return [None] * len(weights)
        if self._process_group.is_single:
            loss.backward()
            return [p.grad for p in self._strategy.parameters]
        trained = [p for p in weights if p.requires_grad]  # a callback may have frozen others
        found = dict(zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True))
        return [found.get(p) for p in weights]

    def _gradient_of_all(
        self, sample: AuditSample | None, factor: float
    ) -> tuple[float, Sequence[Tensor | None]] | None:
        """Run the same batch on all processes: the average of its gradients is the gradient."""
        micro = self._process_group.run_on_main(lambda: None if sample is None else sample.load()[0])
        if micro is None:
            return None
        loss = self._strategy.run_together(lambda: self.loss(micro))
        if loss is None:
            return None
        if loss.requires_grad:
            self._scaled(loss * factor).backward()
        self._strategy.end_pass()
        self._strategy.reduce(self._process_group)
        return loss.item(), [p.grad for p in self._strategy.parameters]
