"""The search for the largest physical batch that fits in memory."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from ..data.loader import Loader, MicroBatch
from ..errors import SettingsError
from ..objective.batch_changes import fresh_batch
from ..objective.objective import Objective
from ..runtime.host import free_on_host
from ..runtime.memory import give_back_memory, is_out_of_memory
from ..runtime.process_group import ProcessGroup
from ..runtime.state_guards import preserve_buffers, preserve_rng

# Share of the host's free memory to use. When a host runs out of memory, it kills the process without an error.
_SHARE_OF_HOST = 0.8


def largest_batch(
    model: nn.Module,
    objective: Objective,
    loader: Loader,
    accelerator: Accelerator,
    process_group: ProcessGroup,
    at_most: int,
    wide: bool,
) -> int:
    """Return the largest number of rows whose forward and backward pass fits in memory on every process.

    The search tries the longest rows. Meanwhile it reserves the other memory that an update needs: two optimizer
    moments per trainable weight, and a third number per weight on several processes or with float32 sums of 16-bit
    gradients. It drops gradients, and leaves weights, random number generators and buffers unchanged.

    Args:
        model: the model on its device, before it is wrapped.
        at_most: the number of rows of an update on one process.
        wide: whether 16-bit gradients will be summed in float32.

    Raises:
        SettingsError: if not even one row fits.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    copies = 2 + (wide or not process_group.is_single)
    on_host = accelerator.device.type == "cpu"
    aside = [] if on_host else [torch.empty_like(p) for p in trainable for _ in range(copies)]
    host = _Host(copies * sum(p.numel() * p.element_size() for p in trainable)) if on_host else None

    def fits(n_rows: int) -> bool:
        if host is not None and not host.has_room_for(n_rows):
            return False
        with preserve_rng(), preserve_buffers(model, *objective.modules):
            try:
                _pass(model, objective, loader.longest_rows(n_rows), accelerator)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                return False
        if host is not None:
            host.took(n_rows)
        return True

    # Each trial keeps the gradients of the one before in memory, as each micro-batch does in training.
    most = largest(fits, at_most)
    model.zero_grad(set_to_none=True)
    del aside
    give_back_memory()
    agreed = process_group.min(most) or 0
    if not agreed:
        raise SettingsError(
            [
                "`batch_size` is 'auto', but even the longest row alone does not fit in memory. Truncate the rows, "
                "set `gradient_checkpointing`, or use a smaller model."
            ]
        )
    return agreed


def largest(fits: Callable[[int], bool], at_most: int) -> int:
    """Return the largest number from 1 to `at_most` that fits, or 0 if none does.

    The trial number doubles until it no longer fits; then a bisection finds the limit, in about 2·log2(limit) trials.
    """
    good, bad = 0, at_most + 1
    while bad - good > 1:
        trial = min(max(1, 2 * good), at_most) if bad > at_most else (good + bad) // 2
        good, bad = (trial, bad) if fits(trial) else (good, trial)
    return good


def _pass(model: nn.Module, objective: Objective, micro: MicroBatch, accelerator: Accelerator) -> None:
    with accelerator.autocast():
        batch = fresh_batch(micro.batch, accelerator.device)
        # If no label counts, the mean is NaN, but takes the same memory.
        means = objective.means(model, batch, micro.counts, objective.terms)[0]
    torch.stack(list(means.values())).sum().backward()


class _Host:
    """The memory of a machine without an accelerator, which may kill the process before anything raises an error.

    So a batch is tried only if the memory per row of a smaller one predicts that it fits.
    """

    def __init__(self, set_aside: int) -> None:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine
        self._free = _SHARE_OF_HOST * free_on_host() / here - set_aside
        self._per_row = 0.0
        _forget_peak()
        self._started = _peak()

    def has_room_for(self, n_rows: int) -> bool:
        return self._per_row * n_rows <= self._free

    def took(self, n_rows: int) -> None:
        self._per_row = max(0, _peak() - self._started) / n_rows


def _forget_peak() -> None:
    with suppress(OSError):  # on systems without this file, the peak is that of the process's whole life
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
