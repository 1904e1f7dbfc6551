"""Where the gradients of a window are summed: as autograd and DDP do it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optimizers import place_state, takes_sparse_gradients
from ..process_group import ProcessGroup


class GradientStrategy:
    """Sums gradients over the passes of a window and over processes: in `param.grad`, in the weights' own dtype; DDP
    reduces them in the last pass. Other strategies override this.

    Attributes:
        reduces_after_passes: whether processes need each other only in `reduce`, and in no pass of a window.
        sparse_parameters: those whose sparse gradients the optimizer gets as they are; of others, dense ones.
    """

    reduces_after_passes = False

    def __init__(self, optimizer: Optimizer) -> None:
        """Args:
        optimizer: steps on the gradients.
        """
        self._optimizer = optimizer
        self.sparse_parameters = takes_sparse_gradients(optimizer)

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """Those whose `grad` holds the window's gradient after its passes."""
        return parameters_of(self._optimizer)

    @property
    def weights(self) -> Sequence[nn.Parameter]:
        """The model's own parameters that `parameters` stand for, in the same order."""
        return self.parameters

    def prepare(self, accelerator: Accelerator, model: nn.Module) -> tuple[nn.Module, AcceleratedOptimizer]:
        """Return model and optimizer as they run on several processes."""
        place_state(self._optimizer)
        # Accelerate would place it with `load_state_dict`, which parts the groups of an optimizer from those it holds.
        return accelerator.prepare(model, self._optimizer, device_placement=[None, False])

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Enclose the windows of an epoch."""
        yield

    def reduce(self, process_group: ProcessGroup) -> None:  # noqa: ARG002
        """Average the sums of the processes, on all of them, after the passes of a window."""
        for p in self.parameters:
            if p.grad is not None and p.grad.is_sparse:
                p.grad = p.grad.coalesce() if p in self.sparse_parameters else p.grad.to_dense()

    def clip(self, max_norm: float) -> Tensor:
        """Clip the window's gradient to a total norm, and return the norm before."""
        return nn.utils.clip_grad_norm_(map(_with_dense_gradient, self.parameters), max_norm)


def _with_dense_gradient(p: Tensor) -> Tensor:
    """Return the parameter, or a stand-in whose gradient is the numbers in a sparse one."""
    if p.grad is None or not p.grad.is_sparse:
        return p
    stand_in = torch.empty_like(p.grad.values())
    stand_in.grad = p.grad.values()
    return stand_in


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return what an optimizer holds."""
    return [p for group in optimizer.param_groups for p in group["params"]]
