"""Where the gradients of a window are summed: the interface, and the sums that autograd and DDP make themselves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer

from ..process_group import ProcessGroup


class GradientStrategy(Protocol):
    """Where the gradients of a window are summed, over its passes and over processes.

    Attributes:
        parameters: those whose `grad` holds the window's gradient after its passes.
        reduces_after_passes: whether processes need each other only in `reduce`, and in no pass of a window.
    """

    parameters: Sequence[nn.Parameter]
    reduces_after_passes: bool

    def prepare_model(self, accelerator: Accelerator, model: nn.Module) -> nn.Module:
        """Wrap a model for passes on several processes."""

    def prepare_optimizer(self, accelerator: Accelerator, optimizer: Optimizer) -> AcceleratedOptimizer:
        """Wrap the optimizer that steps on these gradients."""

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Enclose the windows of an epoch."""

    def reduce(self, process_group: ProcessGroup) -> None:
        """After the passes of a window, average the sums of the processes, on all of them."""


class PlainGradients:
    """Sums in `param.grad`, in the weights' own dtype; DDP reduces them in the last pass."""

    reduces_after_passes = False

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters

    def prepare_model(self, accelerator: Accelerator, model: nn.Module) -> nn.Module:
        return accelerator.prepare_model(model)

    def prepare_optimizer(self, accelerator: Accelerator, optimizer: Optimizer) -> AcceleratedOptimizer:
        return accelerator.prepare_optimizer(optimizer)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        yield

    def reduce(self, process_group: ProcessGroup) -> None: ...
