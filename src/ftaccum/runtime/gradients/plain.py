"""The sums of gradients over a window, as autograd and DDP compute them."""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from ..library_output import ddp_warnings_silenced
from ..memory import none_if_out_of_memory
from ..optimizers import parameters_of, place_state, takes_sparse_gradients
from ..process_group import ProcessGroup
from .process_average import average_gradients


class GradientStrategy:
    """The way to sum gradients over the passes of a window and over processes.

    This class sums in `param.grad`, in the dtype of the weights, and DDP averages over processes in the last pass.
    Parameters outside of the model, such as those of a loss, are averaged after it. Subclasses do it differently.

    Attributes:
        reduces_after_passes: whether processes communicate only in `reduce`, and in no pass of a window.
        gathers_weights: whether processes gather weights in every pass, also in those without gradients.
        sparse_parameters: the parameters whose sparse gradients the optimizer gets as they are. Others get dense ones.
    """

    reduces_after_passes = False
    gathers_weights = False
    _of_model: Set[Tensor] = frozenset()  # the parameters whose gradients DDP averages

    def __init__(self, optimizer: Optimizer) -> None:
        """Create a strategy.

        Args:
            optimizer: takes its steps with the gradients.
        """
        self._optimizer = optimizer
        self.sparse_parameters = takes_sparse_gradients(optimizer)

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """The parameters whose `grad` holds the window's gradient after its passes."""
        return parameters_of(self._optimizer)

    @property
    def weights(self) -> Sequence[nn.Parameter]:
        """The model's own parameters that `parameters` stand for, in the same order."""
        return self.parameters

    def prepare(self, accelerator: Accelerator, model: nn.Module) -> tuple[nn.Module, AcceleratedOptimizer]:
        """Return the model and the optimizer, wrapped by Accelerate."""
        place_state(self._optimizer)
        self._of_model = set(model.parameters())
        # Accelerate would move the state with `load_state_dict`, after which an optimizer and those that it contains no
        # longer share their parameter groups.
        with ddp_warnings_silenced(accelerator):
            return accelerator.prepare(model, self._optimizer, device_placement=[None, False])

    def shard(self, model: nn.Module, device: torch.device) -> None:
        """Shard a model over the processes, if that is what the strategy does."""

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Hold whatever the strategy needs during the windows of an epoch."""
        yield

    def begin_pass(self, *, is_last: bool, counts: bool) -> None:
        """Begin a pass of a window.

        Args:
            is_last: whether it is the last one of the window.
            counts: whether its rows count, and it is not that of a dummy micro-batch.
        """

    def check_backward(self, loss: Tensor) -> None:
        """Check that a backward pass will communicate in the same way on all processes, which call this together.

        Raises:
            DataError: on all processes, if it will not.
        """

    def end_pass(self) -> None:
        """End a pass of a window, after its backward pass."""

    def catch_up(self) -> None:
        """Complete what other processes wait for in a forward pass that has failed on this one."""

    def run_together(self, forward: Callable[[], Tensor]) -> Tensor | None:
        """Run a forward pass outside of windows, and return its loss; None on all processes if memory runs out on one.

        Args:
            forward: runs the pass. If the strategy gathers weights, all processes call this together.
        """
        return none_if_out_of_memory(forward)

    def reset(self) -> None:
        """Forget a window that all processes have abandoned."""

    def independent_passes(self) -> AbstractContextManager[None]:
        """Return a context in which each process may run any number of passes without gradients.

        All processes must enter it, and leave it together.
        """
        return nullcontext()

    def close(self) -> None:
        """Remove what the run has added to the model, except its shards."""

    def show(self) -> None:
        """Put the gradient that the next step will use into the `grad` of the weights, if it is not there."""

    def begin_window(self) -> None:
        """Begin a window. Callbacks may have unfrozen weights since the last one, or added them to the optimizer."""

    def reduce(self, process_group: ProcessGroup) -> None:
        """Complete the window's gradient after its passes, so that all processes have the average.

        DDP has averaged that of the model by then. This makes sparse gradients dense, or coalesces those that the
        optimizer takes.
        """
        for p in self.parameters:
            if p.grad is not None and p.grad.is_sparse:
                p.grad = p.grad.coalesce() if p in self.sparse_parameters else p.grad.to_dense()
        if outside := [p for p in self.parameters if p not in self._of_model]:
            average_gradients(outside, process_group)

    def clip(self, max_norm: float) -> Tensor:
        """Clip the window's gradient to a total norm, and return the norm before clipping."""
        return nn.utils.clip_grad_norm_(map(_with_dense_gradient, self.parameters), max_norm)


def _with_dense_gradient(p: Tensor) -> Tensor:
    """Return the parameter, or a stand-in whose dense gradient has the values of the sparse one."""
    if p.grad is None or not p.grad.is_sparse:
        return p
    stand_in = torch.empty_like(p.grad.values())
    stand_in.grad = p.grad.values()
    return stand_in
