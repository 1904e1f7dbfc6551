"""Where the gradients of a window are summed: as autograd and DDP do it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer

from ..optimizers import place_state
from ..process_group import ProcessGroup


class GradientStrategy:
    """Sums gradients over the passes of a window and over processes: in `param.grad`, in the weights' own dtype; DDP
    reduces them in the last pass. Other strategies override this.

    Attributes:
        reduces_after_passes: whether processes need each other only in `reduce`, and in no pass of a window.
    """

    reduces_after_passes = False

    def __init__(self, optimizer: Optimizer) -> None:
        """Args:
        optimizer: steps on the gradients.
        """
        self._optimizer = optimizer

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """Those whose `grad` holds the window's gradient after its passes."""
        return parameters_of(self._optimizer)

    def prepare(self, accelerator: Accelerator, model: nn.Module) -> tuple[nn.Module, AcceleratedOptimizer]:
        """Return model and optimizer as they run on several processes."""
        place_state(self._optimizer)
        # Accelerate would place it with `load_state_dict`, which parts the groups of an optimizer from those it holds.
        return accelerator.prepare(model, self._optimizer, device_placement=[None, False])

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Enclose the windows of an epoch."""
        yield

    def reduce(self, process_group: ProcessGroup) -> None:
        """Average the sums of the processes, on all of them, after the passes of a window."""


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return what an optimizer holds."""
    return [p for group in optimizer.param_groups for p in group["params"]]
