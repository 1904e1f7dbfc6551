"""Models and losses that differentiate inside their forward pass: forces of an energy, a gradient penalty."""

from collections.abc import Callable
from typing import TypeVar

import torch

from ..runtime.memory import is_out_of_memory

T = TypeVar("T")


class InnerGradients:
    """Runs forward passes without gradients where the caller wants none, unless the model needs them inside.

    Evaluation and measurements run under `torch.no_grad`, in which `torch.autograd.grad` and tensor hooks raise. A pass
    that raises there runs again with gradients, and so do all that come after it.
    """

    def __init__(self) -> None:
        self._are_needed = False

    def run(self, forward_pass: Callable[[], T]) -> T:
        """Return what the pass returns. Its tensors may be part of a graph."""
        if not self._are_needed:
            try:
                return forward_pass()
            except RuntimeError as error:
                if torch.is_grad_enabled() or is_out_of_memory(error):
                    raise
        with torch.enable_grad():
            result = forward_pass()
        self._are_needed = True
        return result
