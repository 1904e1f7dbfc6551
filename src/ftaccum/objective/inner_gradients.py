"""Models and losses that differentiate inside their forward pass, such as forces of an energy or gradient penalties."""

from collections.abc import Callable
from typing import TypeVar

import torch

from ..runtime.memory import is_out_of_memory

T = TypeVar("T")


class InnerGradients:
    """A runner of forward passes that turns gradients on if the model needs them inside the pass.

    Evaluation and measurements run under `torch.no_grad`, in which `torch.autograd.grad` and tensor hooks raise. A pass
    that raises there runs again with gradients, and all later passes run with gradients at once.
    """

    def __init__(self) -> None:
        self._are_needed = False

    def run(self, forward_pass: Callable[[], T]) -> T:
        """Return the result of a pass. Its tensors may be part of a graph."""
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
