"""The largest physical batch that fits, by trying."""

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

# Of the memory that a host says is free: running out there gets the process killed, not told.
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
    """The most rows, all as long as the longest, whose forward and backward pass fits on every process.

    What an update needs besides (two moments of an optimizer for each weight, and where there are several processes a
    bucket of gradients to sync, or instead the second half of float32 sums) is set aside meanwhile. Gradients are
    dropped; weights, generators and buffers stay as they are.

    Args:
        model: on its device, before it is wrapped.
        at_most: rows of an update on one process.
        wide: whether gradients of 16 bits will be summed up in float32.

    Raises:
        SettingsError: where not even one row fits.
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

    # The gradients of one try are in the next one's way, as those of one micro-batch are in the way of the next.
    most = largest(fits, at_most)
    model.zero_grad(set_to_none=True)
    del aside
    give_back_memory()
    agreed = process_group.min(most) or 0
    if not agreed:
        raise SettingsError(
            [
                "`batch_size` is 'auto', but not even one row of the longest fits in memory. Truncate the rows, use "
                "`gradient_checkpointing`, or a smaller model."
            ]
        )
    return agreed


def largest(fits: Callable[[int], bool], at_most: int) -> int:
    """The largest number from 1 to `at_most` that fits, or 0, in about 2·log2 tries: doubled, then halved in."""
    good, bad = 0, at_most + 1
    while bad - good > 1:
        trial = min(max(1, 2 * good), at_most) if bad > at_most else (good + bad) // 2
        good, bad = (trial, bad) if fits(trial) else (good, trial)
    return good


def _pass(model: nn.Module, objective: Objective, micro: MicroBatch, accelerator: Accelerator) -> None:
    with accelerator.autocast():
        batch = fresh_batch(micro.batch, accelerator.device)
        # Where no label counts, the mean is NaN, and takes the same memory.
        means = objective.means(model, batch, micro.counts, objective.terms)[0]
    torch.stack(list(means.values())).sum().backward()


class _Host:
    """Memory of a machine without an accelerator, where nothing raises in time: a batch is tried only where what the
    smaller one took, in proportion, is free."""

    def __init__(self, set_aside: int) -> None:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that share the machine
        self._free = _SHARE_OF_HOST * free_on_host() / here - set_aside
        self._per_row = 0.0
        _forget_peak()
        self._started = _peak()

    def has_room_for(self, n_rows: int) -> bool:
        return self._per_row * n_rows <= self._free

    def took(self, n_rows: int) -> None:
        self._per_row = max(0, _peak() - self._started) / n_rows


def _forget_peak() -> None:
    with suppress(OSError):  # where the system has no such file, the peak is that of the process's whole life
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
