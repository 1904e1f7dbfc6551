"""The search for the largest physical batch that fits in memory."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..data.loader import Loader, MicroBatch
from ..errors import SettingsError
from ..objective.batch_changes import fresh_batch
from ..objective.objective import Objective
from ..runtime.gradients.plain import GradientStrategy
from ..runtime.host import peak_of_process
from ..runtime.memory import free_memory, give_back_memory, none_if_out_of_memory
from ..runtime.process_group import ProcessGroup
from ..runtime.sharding.tensors import local_part
from ..runtime.state_guards import preserve_buffers, preserve_rng

# Share of the free memory to use, where it must not run out.
_SHARE = 0.8


def largest_batch(
    model: nn.Module,
    objective: Objective,
    loader: Loader,
    accelerator: Accelerator,
    process_group: ProcessGroup,
    at_most: int,
    wide: bool,
    sharded: GradientStrategy | None = None,
) -> int:
    """Return the largest number of rows whose forward and backward pass fits in memory on every process.

    The search tries the longest rows. Meanwhile it reserves the other memory that an update needs: two optimizer
    moments per trainable weight, and a third number per weight on several processes or with float32 sums of 16-bit
    gradients. It drops gradients, and leaves weights, random number generators and buffers unchanged.

    Args:
        model: the model on its device, before it is wrapped.
        at_most: the number of rows of an update on one process.
        wide: whether 16-bit gradients will be summed in float32.
        sharded: the strategy that has sharded the model, if it is sharded.

    Raises:
        SettingsError: if not even one row fits.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    copies = 2 + (wide or not process_group.is_single)
    device = accelerator.device
    # A host kills a process that runs out of memory, and processes that gather weights would wait for each other.
    predicts = device.type == "cpu" or sharded is not None
    aside = [] if predicts else [torch.empty_like(p) for p in trainable for _ in range(copies)]
    budget = _MemoryBudget(device, copies * sum(local_part(p).nbytes for p in trainable)) if predicts else None

    def fits(n_rows: int) -> bool:
        if budget is not None and not _agreed(budget.allows(n_rows), sharded, process_group):
            return False
        with preserve_rng(), preserve_buffers(model, *objective.modules):
            micro = loader.longest_rows(n_rows)
            if not _passes(lambda: _loss(model, objective, micro, accelerator), sharded):
                return False
        if budget is not None:
            budget.record(n_rows)
        return True

    # Each trial keeps the gradients of the one before in memory, as each micro-batch does in training.
    most = largest(fits, at_most)
    model.zero_grad(set_to_none=True)
    if sharded is not None:
        sharded.reset()
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


def _loss(model: nn.Module, objective: Objective, micro: MicroBatch, accelerator: Accelerator) -> Tensor:
    with accelerator.autocast():
        batch = fresh_batch(micro.batch, accelerator.device)
        # If no label counts, the mean is NaN, but takes the same memory.
        means = objective.means(model, batch, micro.counts, objective.terms)[0]
    return torch.stack(list(means.values())).sum()


def _passes(forward: Callable[[], Tensor], sharded: GradientStrategy | None) -> bool:
    """Run a forward and a backward pass, and return whether memory sufficed.

    If the weights are sharded, running out of memory in the backward pass is an error.
    """
    if sharded is None:
        return none_if_out_of_memory(lambda: [forward().backward()]) is not None
    loss = sharded.run_together(forward)
    if loss is not None:
        loss.backward()
        sharded.end_pass()
    return loss is not None


def _agreed(flag: bool, sharded: GradientStrategy | None, process_group: ProcessGroup) -> bool:
    """Return a flag, or whether it is true on all processes, if they run trials together."""
    return flag if sharded is None else not process_group.any(not flag)


class _MemoryBudget:
    """A budget of memory for trials, where running out of memory must be avoided.

    So a batch is tried only if the memory per row of a smaller one predicts that it fits.
    """

    def __init__(self, device: torch.device, set_aside: int) -> None:
        self._on_host = device.type == "cpu"
        self._free = _SHARE * free_memory(device) - set_aside
        self._per_row = 0.0
        if self._on_host:
            _forget_peak()
        else:
            torch.accelerator.reset_peak_memory_stats()
        self._started = self._peak()

    def allows(self, n_rows: int) -> bool:
        return self._per_row * n_rows <= self._free

    def record(self, n_rows: int) -> None:
        self._per_row = max(0, self._peak() - self._started) / n_rows

    def _peak(self) -> int:
        return _peak() if self._on_host else torch.accelerator.max_memory_allocated()


def _forget_peak() -> None:
    with suppress(OSError):  # on systems without this file, the peak is that of the process's whole life
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return peak_of_process()
