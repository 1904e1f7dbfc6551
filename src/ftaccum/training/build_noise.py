"""The updates of a run at which the gradient noise scale is measured."""

from torch.optim import Optimizer

from ..objective.item_counts import OF_USER
from ..objective.objective import Objective
from ..planning.base_plan import BasePlan
from ..planning.halves import LEAST_ROWS, MeasuredWindows
from ..planning.plan import Plan
from ..runtime.log import logger
from ..settings.runtime import Runtime
from .closure import needs_closure

_AUTO = 10  # updates from one measurement to the next
_LEAST_MEASURED = 8  # measurements without which nothing is known


def build_measured_windows(
    runtime: Runtime, plan: BasePlan, objective: Objective, optimizer: Optimizer, *, is_sharded: bool
) -> MeasuredWindows:
    """Return the windows to measure; none if the noise scale cannot be measured, which is logged."""
    if runtime.noise_scale is False or (runtime.noise_scale == "auto" and runtime.deterministic):
        return MeasuredWindows()
    reason = _of_loss(objective) or _of_run(plan, optimizer, is_sharded=is_sharded)
    if reason is None and runtime.noise_scale == "auto" and plan.n_windows < _AUTO * _LEAST_MEASURED:
        reason = f"a run of {plan.n_windows} updates is too short for noise_scale='auto'"
    if reason is not None:
        logger.debug(f"The gradient noise scale is not measured: {reason}.")
        return MeasuredWindows()
    every = _AUTO if isinstance(runtime.noise_scale, str) else runtime.noise_scale
    return MeasuredWindows(every, plan.seed)


def repeated_rows(plan: BasePlan) -> int | None:
    """Return the number of rows that each epoch goes through; None if an epoch draws its rows, or for a stream."""
    return plan.n_rows if isinstance(plan, Plan) and not plan.classes else None


def _of_loss(objective: Objective) -> str | None:
    """Return why the loss does not allow a measurement; None if it does."""
    report = objective.report
    if objective.window is not None or report.balanced:
        return "the loss reads all rows of an update together"
    if report.inexact():
        return "accumulating the loss only approximates one large batch"
    if report.in_training.complaint is not None:
        return "the model cannot train on a single row, which may be left over in half an update"
    ways = set(report.ways.values())
    if len(ways) > 1 or (len(objective.terms) > 1 and OF_USER in ways):
        return "the loss has several terms, which are means over different items"
    return None


def _of_run(plan: BasePlan, optimizer: Optimizer, *, is_sharded: bool) -> str | None:
    """Return why the run does not allow a measurement; None if it does."""
    if is_sharded:
        return "the model is sharded"
    if needs_closure(optimizer):
        return "the optimizer computes the gradient of an update several times"
    largest = max(sizes.effective_batch_size for _, sizes in plan.batch_sizes.stages())
    if largest < LEAST_ROWS:
        return f"an update has {largest} rows, fewer than {LEAST_ROWS}"
    return None
