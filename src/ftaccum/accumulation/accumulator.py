"""The gradient of one window, accumulated over its micro-batches.

With N the loss items of the window on all processes, the gradient is ∇ Σ ℓ(item) / N, whatever the split. Count first:
N is summed over all processes before the first forward pass. Then scale: a micro-batch of n items adds the gradient of
its mean loss times n / N. Each process makes equally many passes, and gradients are synced once, in the last one.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ..data.loader import MicroBatch
from ..errors import DataError
from ..objective.batch_changes import fresh_batch
from ..objective.normalizer import LossNormalizer, Means, WeightedMeans
from ..objective.objective import Objective
from ..runtime.gradients.plain import GradientStrategy
from ..runtime.gradients.sparse import SparseEmbeddingGradients
from ..runtime.memory import FailedPass, WindowOutOfMemoryError, is_out_of_memory
from ..runtime.process_group import ProcessGroup
from ..runtime.state_guards import Generators, preserve_buffers, preserve_rng, training_mode
from .buffers import MovingBuffers, SyncedBuffers
from .window import AccumulatedWindow, WindowStart

Failure = DataError | WindowOutOfMemoryError  # what all processes can leave a window with


class GradientAccumulator:
    """Accumulates the gradients of windows in `grad` of the strategy's parameters.

    It neither clips nor steps: training, verification and any other loop do with the gradient what they like.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        objective: Objective,
        strategy: GradientStrategy,
        process_group: ProcessGroup,
        buffers: MovingBuffers | SyncedBuffers | None = None,
    ) -> None:
        """Create an accumulator.

        Args:
            model: as `strategy.prepare_model` returned it.
            strategy: where a window's gradients are summed.
            buffers: those that passes change; None for all of the model and the loss.
        """
        self._accelerator, self._model, self._objective = accelerator, model, objective
        self._strategy, self._process_group = strategy, process_group
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._embeddings = SparseEmbeddingGradients(model, strategy.sparse_parameters)
        self._buffers = buffers or MovingBuffers(model, process_group, objective.modules)
        self._gathers_weights = isinstance(model, FSDPModule) and not process_group.is_single

    def accumulate(self, micro_batches: Sequence[MicroBatch], factor: float = 1.0) -> AccumulatedWindow:
        """Add the gradient of the mean over all loss items of a window, on all processes, to `grad`.

        Where that fails, gradients are dropped, and random state and buffers are as they were before the call.

        Args:
            micro_batches: this process's part of the window. All processes have equally many; a dummy stands in where
                there are no rows.
            factor: what the gradient is multiplied by, to see what rounding makes of it.

        Raises:
            DataError: on all processes, if the rows of one of them cannot be trained on.
            WindowOutOfMemoryError: on all processes, if memory ran out on one of them before the gradients were
                synced.
            torch.OutOfMemoryError: if memory ran out where other processes wait.
        """
        self._buffers.sync()
        start = WindowStart(Generators.now(), self._buffers.snapshot())
        try:
            window = self._accumulate(micro_batches, start, factor)
        except Exception:  # the run is as it was after the update before
            self.zero_gradients()
            start.generators.restore()
            self._buffers.restore(start.buffers)
            raise
        return replace(window, moved_buffers=self._buffers.moved())

    def synced_buffers(self) -> SyncedBuffers:
        """Return the same buffers for an accumulator whose passes are undone by its caller."""
        assert isinstance(self._buffers, MovingBuffers), "only what trains keeps copies"
        return SyncedBuffers(self._buffers)

    def sync_buffers(self) -> None:
        """Copy the main process's buffers to all processes."""
        self._buffers.sync()

    def observe_buffers(self, moved: Sequence[bool], *, undone: bool) -> None:
        """Have large buffers copied from the next window on.

        Args:
            moved: the window's `moved_buffers`, on any process. All processes call this alike.
            undone: whether the window's update was skipped.
        """
        self._buffers.observe(moved, undone=undone)

    def zero_gradients(self) -> None:
        """Drop all gradients, also of trainable parameters that no optimizer holds."""
        self._embeddings.drop()
        for p in (*self._strategy.parameters, *self._trained):
            p.grad = None

    def _accumulate(self, micro_batches: Sequence[MicroBatch], start: WindowStart, factor: float) -> AccumulatedWindow:
        terms = self._objective.terms
        normalizer = LossNormalizer([micro.counts for micro in micro_batches], terms, self._accelerator, factor)
        window = AccumulatedWindow(start, WeightedMeans(terms, self._accelerator.device), normalizer.items_T)
        # Accelerate divides by the number of passes, and syncs when its step counter is a multiple of it.
        self._accelerator.gradient_accumulation_steps, self._accelerator.step = len(micro_batches), 0
        n_local = self._n_local_passes(micro_batches)
        with self._embeddings.sparse():
            failure = self._run_local(micro_batches[:n_local], normalizer, window)
        if n_local == len(micro_batches):
            self._leave_after(failure)
        self._embeddings.hand_over()
        for index, micro in enumerate(micro_batches[n_local:], n_local):
            with _synced_pass():
                self._run_synced(index, micro, normalizer, window, failure)
        self._strategy.reduce(self._process_group)
        return window

    def _n_local_passes(self, micro_batches: Sequence[MicroBatch]) -> int:
        """Return how many passes, from the first on, a process can leave without the others noticing: in the rest it
        gathers weights or syncs gradients."""
        if self._process_group.is_single or self._strategy.reduces_after_passes:
            return len(micro_batches)
        return 0 if self._gathers_weights else len(micro_batches) - 1

    def _run_local(
        self, micro_batches: Sequence[MicroBatch], normalizer: LossNormalizer, window: AccumulatedWindow
    ) -> Failure | None:
        """Run passes until one fails, and return its failure."""
        for index, micro in enumerate(micro_batches):
            try:
                self._run(micro, normalizer, window)
                self._embeddings.collect()
            except (DataError, RuntimeError) as error:
                if (failure := self._failure(index, error)) is None:
                    raise
                return failure
        return None

    def _run(self, micro: MicroBatch, normalizer: LossNormalizer, window: AccumulatedWindow) -> None:
        """Run one forward and backward pass.

        A dummy's pass is left out unless it ends the window: weights that no row of the window uses would get a
        gradient of zeros, and optimizers move weights that have a gradient.
        """
        with self._accelerator.accumulate(self._model), self._leaving_no_trace(micro):
            if micro.is_dummy and not self._accelerator.sync_gradients:
                return
            means, contribution = self._forward(micro, normalizer)
            self._backward(contribution, normalizer)
        window.add(micro, means, contribution)

    def _run_synced(
        self,
        index: int,
        micro: MicroBatch,
        normalizer: LossNormalizer,
        window: AccumulatedWindow,
        failure: Failure | None,
    ) -> None:
        """Run a pass that processes wait for each other in. Before they do, in its backward pass, all of them leave the
        window if one has failed.

        Args:
            failure: that of an earlier pass of this process.
        """
        ddp = self._model if isinstance(self._model, DistributedDataParallel) else None
        with self._accelerator.accumulate(self._model), self._leaving_no_trace(micro):
            try:
                if failure is None:
                    # From its forward pass on, DDP would count on the backward pass.
                    with nullcontext() if ddp is None else ddp.no_sync():
                        means, contribution = self._forward(micro, normalizer)
            except (DataError, RuntimeError) as error:
                if (failure := self._failure(index, error)) is None:
                    raise
            self._leave_after(failure)
            if ddp is not None:
                ddp.reducer.prepare_for_forward()
                ddp.reducer.prepare_for_backward([contribution])
            self._backward(contribution, normalizer)
        window.add(micro, means, contribution)

    def _failure(self, index: int, error: Exception) -> Failure | None:
        """Return what all processes raise after an error in one pass of this one; None if it has to raise it alone."""
        if isinstance(error, DataError):
            return error
        # Where memory runs out in a forward pass that gathers weights, the other processes wait in it.
        recoverable = is_out_of_memory(error) and not self._gathers_weights
        return WindowOutOfMemoryError(FailedPass(index, str(error))) if recoverable else None

    def _leave_after(self, failure: Failure | None) -> None:
        """Raise an error on all processes if one of them has a failure: its DataError, or else that memory ran out."""
        if not self._process_group.any(failure is not None):
            return
        self._process_group.run_on_all(lambda: _raise_data_error(failure))
        raise failure or WindowOutOfMemoryError(None)

    def _forward(self, micro: MicroBatch, normalizer: LossNormalizer) -> tuple[Means, Tensor]:
        """Return a micro-batch's mean losses, and its part of the window's loss.

        Raises:
            DataError: if there is nothing to backpropagate, and other processes may wait in the backward pass.
        """
        batch = fresh_batch(micro.batch, self._accelerator.device)
        # Without a name for the outputs, which would keep the logits through the backward pass.
        means = self._objective.means(self._model, batch, micro.counts, micro.terms, micro.names)[0]
        contribution = normalizer.contribution(means, micro.counts)
        if not contribution.requires_grad and not self._process_group.is_single:
            raise DataError(
                f"The loss of {micro.names} does not depend on any trainable parameter. On several processes every "
                "pass needs a gradient: return 0 times the sum of an output in place of a constant."
            )
        return means, contribution

    def _backward(self, contribution: Tensor, normalizer: LossNormalizer) -> None:
        """Backpropagate a micro-batch's loss, unless it is a constant for these rows."""
        if contribution.requires_grad:
            self._accelerator.backward(normalizer.for_backward(contribution))

    def _leaving_no_trace(self, micro: MicroBatch) -> ExitStack:
        """Preserve random state and buffers around a dummy's pass."""
        stack = ExitStack()
        if micro.is_dummy:
            stack.enter_context(preserve_rng())
            stack.enter_context(preserve_buffers(self._model, *self._objective.modules))
            if self._objective.report.in_training.complaint is not None:  # of a single row, as a dummy has
                stack.enter_context(training_mode(self._model, training=False))
        return stack


@contextmanager
def _synced_pass() -> Iterator[None]:
    """Say what to do if memory runs out where processes wait for each other."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(
            "Memory ran out in a pass in which gradients are synced, or weights gathered: the other processes are "
            "in the middle of it, and none can go on. Lower `batch_size` or `max_tokens` (the size of an update "
            f"stays what it is), or use `gradient_checkpointing`. The device said: {error}"
        ) from error


def _raise_data_error(failure: Failure | None) -> None:
    if isinstance(failure, DataError):
        raise failure
