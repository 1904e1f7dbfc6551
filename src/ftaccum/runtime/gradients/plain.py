"""Where the gradients of a window are summed: as autograd and DDP do it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer

from ..process_group import ProcessGroup


class GradientStrategy:
    """Sums gradients over the passes of a window and over processes: in `param.grad`, in the weights' own dtype; DDP
    reduces them in the last pass. Other strategies override this.

    Attributes:
        parameters: those whose `grad` holds the window's gradient after its passes.
        reduces_after_passes: whether processes need each other only in `reduce`, and in no pass of a window.
    """

    reduces_after_passes = False

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters

    def prepare_model(self, accelerator: Accelerator, model: nn.Module) -> nn.Module:
        """Wrap a model for passes on several processes."""
        return accelerator.prepare_model(model)

    def prepare_optimizer(self, accelerator: Accelerator, optimizer: Optimizer) -> AcceleratedOptimizer:
        """Wrap the optimizer that steps on these gradients."""
        return accelerator.prepare_optimizer(optimizer)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Enclose the windows of an epoch."""
        yield

    def reduce(self, process_group: ProcessGroup) -> None:
        """Average the sums of the processes, on all of them, after the passes of a window."""
