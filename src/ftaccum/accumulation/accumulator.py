"""Gradient accumulation: the gradient of one window, summed over its micro-batches.

With N loss items in the window on all processes, the gradient is ∇ Σ ℓ(item) / N, however the window is split. The
accumulator first counts: it sums N over all processes before the first forward pass. Then it scales: a micro-batch of n
items adds the gradient of its mean loss times n / N. All processes run the same number of passes, and sync gradients
once, in the last pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.loader import MicroBatch
from ..errors import DataError, SettingsError
from ..objective.batch_changes import fresh_batch
from ..objective.normalizer import LossNormalizer, Means, WeightedMeans
from ..objective.objective import Objective
from ..runtime.accumulation_backend import AccumulationBackend
from ..runtime.gradients.plain import GradientStrategy
from ..runtime.gradients.sparse import SparseEmbeddingGradients
from ..runtime.memory import FailedPass, WindowOutOfMemoryError, is_out_of_memory
from ..runtime.process_group import ProcessGroup
from ..runtime.state_guards import Generators
from .buffers import MovingBuffers, SyncedBuffers
from .dummies import leaving_no_trace
from .window import AccumulatedWindow, WindowStart

Failure = DataError | WindowOutOfMemoryError  # errors with which all processes leave a window together


class GradientAccumulator:
    """Accumulates the gradient of a window in the `grad` of the strategy's parameters.

    It neither clips the gradient nor steps the optimizer; its caller does.

    Attributes:
        after_pass: called after each forward and backward pass of a window, except for the last one.
        before_backward: called with the loss of each pass before its backward pass.
    """

    def __init__(
        self,
        accelerator: AccumulationBackend,
        model: nn.Module,
        objective: Objective,
        strategy: GradientStrategy,
        process_group: ProcessGroup,
        buffers: MovingBuffers | SyncedBuffers | None = None,
    ) -> None:
        """Create an accumulator.

        Args:
            model: the model, as `strategy.prepare` returned it.
            strategy: sums the gradients of a window.
            buffers: the buffers that passes may change; None for all buffers of the model and the loss.
        """
        self._accelerator, self._model, self._objective = accelerator, model, objective
        self._strategy, self._process_group = strategy, process_group
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._embeddings = SparseEmbeddingGradients(model, strategy.sparse_parameters)
        self._buffers = buffers or MovingBuffers(model, process_group, objective.modules)
        self.after_pass: Callable[[], None] = lambda: None
        self.before_backward: Callable[[Tensor], None] = lambda _: None

    def accumulate(self, micro_batches: Sequence[MicroBatch], factor: float = 1.0) -> AccumulatedWindow:
        """Add the gradient of a window's loss, the mean over its loss items on all processes, to `grad`.

        If this fails, drop gradients and restore random state and buffers.

        Args:
            micro_batches: this process's part of the window. All processes must have the same number; dummy
                micro-batches stand in for missing rows.
            factor: multiplies the gradient, to measure the effect of rounding.

        Raises:
            DataError: on all processes, if the rows of one of them cannot be trained on.
            SettingsError: if a weight has been unfrozen, whose gradient would not be synced.
            WindowOutOfMemoryError: on all processes, if memory ran out on one of them before the gradients were
                synced.
            torch.OutOfMemoryError: if memory ran out in a pass that other processes wait in.
        """
        self._refuse_unfrozen()
        self._buffers.sync()
        start = WindowStart(Generators.now(), self._buffers.snapshot())
        try:
            window = self._accumulate(micro_batches, start, factor)
        except Exception:  # restore the state after the previous update
            self.zero_gradients()
            self._strategy.reset()
            start.generators.restore()
            self._buffers.restore(start.buffers)
            raise
        return replace(window, moved_buffers=self._buffers.moved())

    def synced_buffers(self) -> SyncedBuffers:
        """Return the same buffers for an accumulator whose caller undoes its passes."""
        assert isinstance(self._buffers, MovingBuffers), "only the accumulator that trains keeps copies"
        return SyncedBuffers(self._buffers)

    def sync_buffers(self) -> None:
        """Copy the main process's buffers to all processes."""
        self._buffers.sync()

    def observe_buffers(self, moved: Sequence[bool], *, undone: bool) -> None:
        """Copy large buffers that have changed before each of the following windows.

        All processes must make the same call.

        Args:
            moved: for each of the window's `moved_buffers`, whether it is true on any process.
            undone: whether the window's update was skipped.
        """
        self._buffers.observe(moved, undone=undone)

    def zero_gradients(self) -> None:
        """Drop all gradients, including those of trainable parameters that the optimizer does not hold."""
        self._embeddings.drop()
        for p in (*self._strategy.parameters, *self._trained):
            p.grad = None

    def _refuse_unfrozen(self) -> None:
        """Refuse weights that have been unfrozen: DDP would not sync their gradients, and FSDP2 would drop them."""
        if self._process_group.is_single or self._strategy.reduces_after_passes:
            return
        known = set(self._trained)
        names = [name for name, p in self._model.named_parameters() if p.requires_grad and p not in known]
        if names:
            raise SettingsError(
                [
                    f"The weight `{names[0].removeprefix('module.')}` was frozen at the start of the run and is not "
                    "any more. With several processes, weights can be frozen during a run, but not unfrozen. Leave it "
                    "trainable with a learning rate of 0, or start a new run after unfreezing it."
                ]
            )

    def _accumulate(self, micro_batches: Sequence[MicroBatch], start: WindowStart, factor: float) -> AccumulatedWindow:
        terms = self._objective.terms
        normalizer = LossNormalizer([micro.counts for micro in micro_batches], terms, self._accelerator, factor)
        window = AccumulatedWindow(start, WeightedMeans(terms, self._accelerator.device), normalizer.items_T)
        # Accelerate divides by the number of passes, and syncs when its step counter is a multiple of that number.
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
            self._pass_done()
        self._strategy.reduce(self._process_group)
        return window

    def _n_local_passes(self, micro_batches: Sequence[MicroBatch]) -> int:
        """Return the number of passes at the start of a window that need no other process.

        In the remaining passes, processes gather weights or sync gradients.
        """
        if self._process_group.is_single or self._strategy.reduces_after_passes:
            return len(micro_batches)
        return 0 if self._strategy.gathers_weights else len(micro_batches) - 1

    def _run_local(
        self, micro_batches: Sequence[MicroBatch], normalizer: LossNormalizer, window: AccumulatedWindow
    ) -> Failure | None:
        """Run passes until one fails; return its failure, or None if all succeed."""
        for index, micro in enumerate(micro_batches):
            try:
                self._run(micro, normalizer, window)
                self._embeddings.collect()
                self._pass_done()
            except (DataError, RuntimeError) as error:
                if (failure := self._failure(index, error)) is None:
                    raise
                return failure
        return None

    def _run(self, micro: MicroBatch, normalizer: LossNormalizer, window: AccumulatedWindow) -> None:
        """Run one forward and backward pass.

        Skip a dummy micro-batch unless it is the last one. Its zero gradients would reach weights that no row of the
        window uses, and optimizers may change any weight that has a gradient.
        """
        with self._accelerator.accumulate(self._model), leaving_no_trace(micro, self._model, self._objective):
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
        """Run a pass in which processes wait for each other.

        If one process has failed, all of them leave the window before the backward pass, in which they would wait.

        Args:
            index: the position of the pass in the window.
            failure: the failure of an earlier pass of this process, if any.
        """
        ddp = self._model if isinstance(self._model, DistributedDataParallel) else None
        with self._accelerator.accumulate(self._model), leaving_no_trace(micro, self._model, self._objective):
            self._strategy.begin_pass(is_last=self._accelerator.sync_gradients, counts=not micro.is_dummy)
            try:
                if failure is None:
                    # Without `no_sync`, DDP would expect a backward pass after this forward pass.
                    with nullcontext() if ddp is None else ddp.no_sync():
                        means, contribution = self._forward(micro, normalizer)
            except (DataError, RuntimeError) as error:
                if (failure := self._failure(index, error)) is None:
                    raise
            if failure is not None:
                self._strategy.catch_up()
            self._leave_after(failure)
            self._strategy.check_backward(contribution)
            if ddp is not None:
                ddp.reducer.prepare_for_forward()
                ddp.reducer.prepare_for_backward([contribution])
            self._backward(contribution, normalizer)
            self._strategy.end_pass()
        window.add(micro, means, contribution)

    def _pass_done(self) -> None:
        if not self._accelerator.sync_gradients:
            self.after_pass()

    def _failure(self, index: int, error: Exception) -> Failure | None:
        """Return the failure that all processes raise after an error in this one; None if this one raises it alone."""
        if isinstance(error, DataError):
            return error
        return WindowOutOfMemoryError(FailedPass(index, str(error))) if is_out_of_memory(error) else None

    def _leave_after(self, failure: Failure | None) -> None:
        """Raise an error on all processes if any of them has a failure: its DataError, or an out-of-memory error."""
        if not self._process_group.any(failure is not None):
            return
        self._process_group.run_on_all(lambda: _raise_data_error(failure))
        raise failure or WindowOutOfMemoryError(None)

    def _forward(self, micro: MicroBatch, normalizer: LossNormalizer) -> tuple[Means, Tensor]:
        """Return a micro-batch's mean loss by term, and its part of the window's loss (a scalar).

        Raises:
            DataError: on several processes, if there is nothing to backpropagate: others may wait in the backward pass.
        """
        batch = fresh_batch(micro.batch, self._accelerator.device)
        # Do not assign the outputs to a variable, which would keep the logits in memory during the backward pass.
        means = self._objective.means(self._model, batch, micro.counts, micro.terms, micro.names)[0]
        contribution = normalizer.contribution(means, micro.counts)
        if not contribution.requires_grad and not self._process_group.is_single:
            raise DataError(
                f"The loss of {micro.names} does not depend on any trainable parameter. With several processes, every "
                "micro-batch needs a gradient. Instead of a constant, return 0 times the sum of an output, such as "
                "`0 * outputs.logits.sum()`."
            )
        return means, contribution

    def _backward(self, contribution: Tensor, normalizer: LossNormalizer) -> None:
        """Run the backward pass of a micro-batch, unless its loss is a constant."""
        if contribution.requires_grad:
            self.before_backward(contribution)
            self._accelerator.backward(normalizer.for_backward(contribution))


@contextmanager
def _synced_pass() -> Iterator[None]:
    """Extend an out-of-memory error with a remedy, in a pass where processes wait for each other."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(
            "Memory ran out in a pass in which gradients are synced or weights are gathered. The other processes are "
            "in the middle of this pass, so the run cannot continue. Lower `batch_size` or `max_tokens`, which leaves "
            f"the effective batch unchanged, or set `gradient_checkpointing`. The device reported: {error}"
        ) from error


def _raise_data_error(failure: Failure | None) -> None:
    if isinstance(failure, DataError):
        raise failure
