"""Checks of a loss over the window that need the sizes of the run: memory, and sharded weights that it reads."""

import torch

from ..errors import SettingsError, refuse
from ..insight.format import format_bytes
from ..objective.objective import Objective
from ..objective.report import ExactnessReport
from ..planning.base_plan import BasePlan
from ..planning.batch_size import BatchSizes
from ..planning.plan import Plan
from ..runtime.memory import free_memory
from ..runtime.process_group import ProcessGroup
from .build_sharding import WHOLE


def check_loss_memory(
    report: ExactnessReport, plan: BasePlan, batch_sizes: BatchSizes, device: torch.device, process_group: ProcessGroup
) -> None:
    """Raise SettingsError, on all processes, if the loss of a whole update will not fit in the free memory of one."""
    memory = None if report.window is None else report.window.memory
    if memory is None:
        return
    n_rows = max(sizes.effective_batch_size for _, sizes in batch_sizes.stages())
    if isinstance(plan, Plan) and plan.remainder == "flush":  # no update goes beyond an epoch
        n_rows = min(n_rows, plan.n_rows)
    needed = memory.of(n_rows)
    free = process_group.min(free_memory(device))
    assert free is not None, "each process has a number"
    if needed > free:
        raise SettingsError(
            [
                f"An update has {n_rows:,} rows, for which `loss_fn` needs about {format_bytes(needed)} of "
                f"memory: with `loss_over='window'`, it gets all rows of an update at once, and each process computes "
                f"it. {format_bytes(free)} are free. Lower `effective_batch_size` or `gradient_accumulation_steps`."
            ]
        )


def check_sharded_window(objective: Objective, *, is_compiled: bool) -> None:
    """Raise SettingsError if the terms over the window cannot be computed with a sharded model.

    Args:
        is_compiled: whether the model is compiled.
    """
    window, faults = objective.report.window, []
    names = () if window is None else window.read_parameters
    if names:
        faults.append(
            f"The model is sharded, but `loss_fn` reads its weight `{names[0]}` outside of `forward`, where no process "
            "has all of it. Make it a parameter of the loss (`loss_fn` may be an nn.Module), return what depends on it "
            f"from `loss_inputs`, or {WHOLE}."
        )
    if objective.window is not None and is_compiled:
        balance = ", set `router_balance='micro_batch'`" if objective.report.balanced else ""
        faults.append(
            "The model is sharded and `compile` is True, but with two passes over an update, both need the same "
            f"compiled graph, which shards do not have. Leave `compile` out{balance}, or {WHOLE}."
        )
    refuse(faults)
