"""The part of Accelerate's interface that accumulates a gradient."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class AccumulationBackend(Protocol):
    """The interface of an Accelerator that the accumulator uses; `LoopAccelerator` has it, too.

    Attributes:
        gradient_accumulation_steps: the number of passes of the current window.
        step: the number of passes of the window that have begun.
        sync_gradients: whether the current pass is the last one of the window.
    """

    gradient_accumulation_steps: int
    step: int
    sync_gradients: bool

    @property
    def device(self) -> torch.device:
        """The device of the model."""

    @property
    def num_processes(self) -> int:
        """The number of processes."""

    @property
    def scaler(self) -> Any:
        """The gradient scaler of fp16; None without one."""

    @property
    def mixed_precision(self) -> str:
        """The precision of autocast: "no", "bf16" or "fp16"."""

    def accumulate(self, *models: Any) -> AbstractContextManager[None]:
        """Surround a forward and backward pass, and count it in `step`."""

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a loss, divided by `gradient_accumulation_steps`."""

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        """Return a tensor reduced over all processes, by "sum"."""
