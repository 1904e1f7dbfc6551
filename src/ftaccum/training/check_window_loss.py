"""Checks of a loss over the window that need the sizes of the run: memory, and sharded weights that it reads."""

import os
from collections.abc import Sequence

import torch

from ..errors import SettingsError
from ..objective.report import ExactnessReport
from ..planning.base_plan import BasePlan
from ..planning.batch_size import BatchSizes
from ..planning.plan import Plan
from ..runtime.host import free_on_host
from ..runtime.memory import free_on_device
from .build_sharding import WHOLE


def check_loss_memory(report: ExactnessReport, plan: BasePlan, batch_sizes: BatchSizes, device: torch.device) -> None:
    """Raise SettingsError if the loss of a whole update will not fit in the free memory of the device."""
    if report.loss_memory is None:
        return
    n_rows = max(sizes.effective_batch_size for _, sizes in batch_sizes.stages())
    if isinstance(plan, Plan) and plan.remainder == "flush":  # no update goes beyond an epoch
        n_rows = min(n_rows, plan.n_rows)
    needed = report.loss_memory.of(n_rows)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine
    free = free_on_host() / here if device.type == "cpu" else free_on_device()
    if needed > free:
        raise SettingsError(
            [
                f"An update has {n_rows:,} rows, for which `loss_fn` needs about {_gigabytes(needed)} of "
                f"memory: with `loss_over='window'`, it gets all rows of an update at once, and each process computes "
                f"it. {_gigabytes(free)} are free. Lower `effective_batch_size` or `gradient_accumulation_steps`."
            ]
        )


def refuse_sharded_parameters(names: Sequence[str]) -> None:
    """Raise SettingsError if a loss over the window reads weights of a sharded model itself."""
    if names:
        raise SettingsError(
            [
                f"The model is sharded, but `loss_fn` reads its weight `{names[0]}` outside of `forward`, where no "
                "process has all of it. Make it a parameter of the loss (`loss_fn` may be an nn.Module), return what "
                f"depends on it from `loss_inputs`, or {WHOLE}."
            ]
        )


def _gigabytes(number: float) -> str:
    return f"{number / 2**30:.1f} GiB"
