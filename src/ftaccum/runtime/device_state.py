"""The device of a run: its name, whether it is idle, and its peak memory."""

from contextlib import suppress

import torch

from .host import peak_of_process

# Their streams can be asked without a wait.
_ASYNCHRONOUS = ("cuda", "xpu")


def device_name(device: torch.device) -> str:
    """Return the name of a device for people, such as "NVIDIA H200" or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def is_idle(device: torch.device) -> bool:
    """Return whether a device has finished everything that it was given. A CPU always has."""
    return device.type not in _ASYNCHRONOUS or torch.accelerator.current_stream(device).query()


def finish_work(device: torch.device) -> None:
    """Wait until a device has finished everything that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def forget_peak_memory(device: torch.device) -> None:
    """Let the peak memory of a device start again from its present memory. That of a CPU's process stays."""
    if device.type != "cpu":
        with suppress(RuntimeError, NotImplementedError):  # MPS
            torch.accelerator.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes so far: on a CPU of the process, on another device of this process's tensors there.

    0 if the device does not count them.
    """
    if device.type == "cpu":
        return peak_of_process()
    with suppress(RuntimeError, NotImplementedError):  # MPS
        return torch.accelerator.max_memory_allocated(device)
    return 0
