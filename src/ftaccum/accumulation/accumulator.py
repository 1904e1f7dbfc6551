"""Gradient accumulation: the gradient of one window, summed over its micro-batches.

With N loss items in the window on all processes, the gradient is ∇ Σ ℓ(item) / N, however the window is split. The
accumulator first counts: it sums N over all processes before the first forward pass. Then it scales: a micro-batch of n
items adds the gradient of its mean loss times n / N. All processes run the same number of passes, and sync gradients
once, in the last pass. A loss that reads all rows of the window together takes two passes (`two_passes`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.loader import MicroBatch
from ..errors import DataError
from ..objective.batch_changes import fresh_batch
from ..objective.normalizer import LossNormalizer, WeightedMeans
from ..objective.objective import Objective
from ..runtime.accumulation_backend import AccumulationBackend
from ..runtime.gradients.in_place import InPlaceGradients
from ..runtime.gradients.plain import GradientStrategy
from ..runtime.gradients.sparse import SparseEmbeddingGradients
from ..runtime.lazy.value import LazyError
from ..runtime.process_group import ProcessGroup
from ..runtime.state_guards import Generators
from .buffers import MovingBuffers, SyncedBuffers
from .dummies import leaving_no_trace
from .failures import Failure, failure_of, leave_after, refuse_unfrozen, synced_pass
from .halves import HalfGradients
from .two_passes import MicroBatchLoss, TwoPasses
from .window import AccumulatedWindow, WindowStart


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
        self._large_layers = InPlaceGradients(model)
        self._embeddings = SparseEmbeddingGradients(model, strategy.sparse_parameters, on_one=process_group.is_single)
        self._buffers = buffers or MovingBuffers(model, process_group, objective.modules)
        self.after_pass: Callable[[], None] = lambda: None
        self.before_backward: Callable[[Tensor], None] = lambda _: None

    def accumulate(
        self,
        micro_batches: Sequence[MicroBatch],
        factor: float = 1.0,
        seed: Sequence[int] = (0,),
        n_first: int | None = None,
    ) -> AccumulatedWindow:
        """Add the gradient of a window's loss, the mean over its loss items on all processes, to `grad`.

        If this fails, drop gradients and restore random state and buffers. If a pass with a lazy last layer fails,
        repeat the window with a whole one; `after_pass` is then called for the passes of both.

        Args:
            micro_batches: this process's part of the window. All processes must have the same number; dummy
                micro-batches stand in for missing rows.
            factor: multiplies the gradient, to measure the effect of rounding.
            seed: seeds the random numbers that a loss over the window draws; the same on all processes.
            n_first: the number of micro-batches in a random half to compare with the rest; the same on all processes.

        Raises:
            DataError: on all processes, if the rows of one of them cannot be trained on.
            SettingsError: if a weight has been unfrozen, whose gradient would not be synced.
            WindowOutOfMemoryError: on all processes, if memory ran out on one before the gradients were synced.
            torch.OutOfMemoryError: if memory ran out in a pass that other processes wait in.
        """
        self._strategy.begin_window()
        if not (self._process_group.is_single or self._strategy.reduces_after_passes):
            refuse_unfrozen(self._model, self._trained)
        self._buffers.sync()
        start = WindowStart(Generators.now(), self._buffers.snapshot())
        window = None
        if (attributes := self._objective.attributes_before_lazy_passes()) is not None:
            try:
                with self._objective.lazy_last_layer(), self._restoring(start):
                    window = self._accumulate(micro_batches, start, factor, seed, n_first)
            except LazyError as error:
                attributes.restore()
                self._objective.log_failed_lazy_pass(error)
        if window is None:
            with self._restoring(start):
                window = self._accumulate(micro_batches, start, factor, seed, n_first)
        return replace(window, moved_buffers=self._buffers.moved())

    @contextmanager
    def _restoring(self, start: WindowStart) -> Iterator[None]:
        """After an error, restore the state after the previous update."""
        try:
            yield
        except Exception:
            self.zero_gradients()
            self._strategy.reset()
            start.generators.restore()
            self._buffers.restore(start.buffers)
            raise

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
        unfrozen = (p for p in self._model.parameters() if p.requires_grad)
        for p in (*self._strategy.parameters, *self._trained, *unfrozen):
            p.grad = None

    def _accumulate(
        self,
        micro_batches: Sequence[MicroBatch],
        start: WindowStart,
        factor: float,
        seed: Sequence[int],
        n_first: int | None,
    ) -> AccumulatedWindow:
        terms = self._objective.terms
        normalizer = LossNormalizer([micro.counts for micro in micro_batches], terms, self._accelerator, factor)
        two_passes = self._first_pass(micro_batches, start, seed)
        window = AccumulatedWindow(start, WeightedMeans(terms, self._accelerator.device), normalizer, two_passes)
        halves = HalfGradients(self._accelerator, self._strategy, self._embeddings, micro_batches, n_first)
        # Accelerate divides by the number of passes, and syncs when its step counter is a multiple of that number.
        self._accelerator.gradient_accumulation_steps, self._accelerator.step = len(micro_batches), 0
        n_local = self._n_local_passes(micro_batches)
        with self._embeddings.sparse(), self._large_layers.in_place():
            failure = self._run_local(micro_batches[:n_local], window, halves)
        if n_local == len(micro_batches):
            leave_after(failure, self._process_group)
        self._embeddings.hand_over()
        for index, micro in enumerate(micro_batches[n_local:], n_local):
            with synced_pass():
                self._run_synced(index, micro, window, failure)
            self._pass_done()
        self._strategy.reduce(self._process_group)
        window = replace(window, agreement=halves.compare(normalizer))
        return window if two_passes is None else window.after(two_passes)

    def _first_pass(
        self, micro_batches: Sequence[MicroBatch], start: WindowStart, seed: Sequence[int]
    ) -> TwoPasses | None:
        """Run the first of two passes, if the loss reads all rows of a window together."""
        terms = self._objective.window
        if terms is None:
            return None
        two_passes = TwoPasses(self._model, self._objective, terms, self._process_group)
        with self._strategy.independent_passes():
            failure = two_passes.collect(micro_batches)
        leave_after(failure, self._process_group)
        if two_passes.forward_passes > 1:
            start.buffers.restore()  # the second pass moves them again; the loss moves its own once, in `compute`
        two_passes.compute(seed)
        return two_passes

    def _n_local_passes(self, micro_batches: Sequence[MicroBatch]) -> int:
        """Return the number of passes at the start of a window that need no other process.

        In the remaining passes, processes gather weights or sync gradients.
        """
        if self._process_group.is_single or self._strategy.reduces_after_passes:
            return len(micro_batches)
        return 0 if self._strategy.gathers_weights else len(micro_batches) - 1

    def _run_local(
        self, micro_batches: Sequence[MicroBatch], window: AccumulatedWindow, halves: HalfGradients
    ) -> Failure | None:
        """Run passes until one fails; return its failure, or None if all succeed."""
        for index, micro in enumerate(micro_batches):
            try:
                self._run(index, micro, window)
                self._embeddings.collect()
                halves.pass_done(index)
                self._pass_done()
            except (DataError, RuntimeError) as error:
                if (failure := failure_of(index, error)) is None:
                    raise
                return failure
        return None

    def _run(self, index: int, micro: MicroBatch, window: AccumulatedWindow) -> None:
        """Run one forward and backward pass.

        Skip a dummy micro-batch unless it is the last one. Its zero gradients would reach weights that no row of the
        window uses, and optimizers may change any weight that has a gradient.
        """
        with self._accelerator.accumulate(self._model), leaving_no_trace(micro, self._model, self._objective):
            if micro.is_dummy and not self._accelerator.sync_gradients:
                return
            loss = self._forward(index, micro, window)
            self._backward(loss, window.normalizer)
        window.add(micro, loss)

    def _run_synced(self, index: int, micro: MicroBatch, window: AccumulatedWindow, failure: Failure | None) -> None:
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
                        loss = self._forward(index, micro, window)
            except (DataError, RuntimeError) as error:
                if (failure := failure_of(index, error)) is None:
                    raise
            if failure is not None:
                self._strategy.catch_up()
            leave_after(failure, self._process_group)
            self._strategy.check_backward(loss.backward)
            if ddp is not None:
                ddp.reducer.prepare_for_forward()
                ddp.reducer.prepare_for_backward([loss.backward])
            self._backward(loss, window.normalizer)
            self._strategy.end_pass()
        window.add(micro, loss)

    def _pass_done(self) -> None:
        if not self._accelerator.sync_gradients:
            self.after_pass()

    def _forward(self, index: int, micro: MicroBatch, window: AccumulatedWindow) -> MicroBatchLoss:
        """Return the loss of a micro-batch.

        Args:
            index: the position of the pass in the window.

        Raises:
            DataError: on several processes, if there is nothing to backpropagate: others may wait in the backward pass.
        """
        if window.two_passes is not None:
            loss = window.two_passes.loss(index, micro, window.normalizer, is_last=self._accelerator.sync_gradients)
        else:
            batch = fresh_batch(micro.batch, self._accelerator.device)
            # Do not assign the outputs to a variable, which would keep the logits in memory during the backward pass.
            means = self._objective.means(self._model, batch, micro.counts, micro.terms, micro.names)[0]
            contribution = window.normalizer.contribution(means, micro.counts)
            loss = MicroBatchLoss(means, contribution, contribution)
        if not loss.backward.requires_grad and not self._process_group.is_single:
            raise DataError(
                f"The loss of {micro.names} does not depend on any trainable parameter. With several processes, every "
                "micro-batch needs a gradient. Instead of a constant, return 0 times the sum of an output, such as "
                "`0 * outputs.logits.sum()`."
            )
        return loss

    def _backward(self, loss: MicroBatchLoss, normalizer: LossNormalizer) -> None:
        """Run the backward pass of a micro-batch, unless its loss is a constant."""
        if loss.backward.requires_grad:
            self.before_backward(loss.contribution)
            self._accelerator.backward(normalizer.for_backward(loss.backward))
