"""The accelerator of a loop that the user wrote: theirs if they have one, or plain torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, distributed

_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class LoopAccelerator:
    """An `AccumulationBackend` over the user's Accelerator or over plain torch.

    The steps of a window are counted here. So the user's Accelerator keeps its own number of accumulation steps.

    Attributes:
        device: the device of the model.
        num_processes: the number of processes.
        gradient_accumulation_steps, step, sync_gradients: as in an Accelerator, for the current window.
    """

    def __init__(self, accelerator: Accelerator | None, scaler: Any, device: torch.device) -> None:
        """Args:
        accelerator: the user's; None to use torch's default process group, if there is one.
        scaler: the `torch.amp.GradScaler` of a loop without Accelerate, if it has one.
        """
        self._accelerator, self._scaler, self.device = accelerator, scaler, device
        self.num_processes = n_processes(accelerator)
        self.gradient_accumulation_steps, self.step, self.sync_gradients = 1, 0, True

    @property
    def scaler(self) -> Any:
        """The gradient scaler, if there is one."""
        return self._scaler if self._accelerator is None else self._accelerator.scaler

    @property
    def mixed_precision(self) -> str:
        """The precision in which autocast runs the passes, in Accelerate's words; "no" without autocast."""
        if self._accelerator is not None:
            return str(self._accelerator.mixed_precision)
        device = self.device.type
        return _PRECISIONS.get(torch.get_autocast_dtype(device), "no") if torch.is_autocast_enabled(device) else "no"

    @contextmanager
    def accumulate(self, *models: Any) -> Iterator[None]:  # noqa: ARG002
        self.step += 1
        self.sync_gradients = self.step % self.gradient_accumulation_steps == 0
        yield

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a loss, divided by the number of passes, and scaled if there is a scaler."""
        loss = loss / self.gradient_accumulation_steps
        if self._accelerator is not None:
            self._accelerator.backward(loss * self._accelerator.gradient_accumulation_steps)  # which it divides by
        else:
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        """Return the sum of a tensor over all processes."""
        assert reduction == "sum", "no other reduction is needed"
        if self.num_processes > 1:
            distributed.all_reduce(tensor)
        return tensor

    def end_window(self) -> None:
        """Let the user's optimizers and schedulers, if Accelerate has prepared them, take their next step."""
        if self._accelerator is not None:
            self._accelerator.gradient_state._set_sync_gradients(True)


def n_processes(accelerator: Accelerator | None) -> int:
    """Return the number of processes of an Accelerator, or of torch's default process group; 1 if there is none."""
    if accelerator is not None:
        return accelerator.num_processes
    is_launched = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_launched else 1
