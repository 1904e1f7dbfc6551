"""The updates of a run at which the gradient noise scale is measured."""

from torch.optim import Optimizer

from ..objective.item_counts import OF_USER
from ..objective.objective import Objective
from ..planning.base_plan import BasePlan
from ..planning.halves import AUTO_EVERY, AUTO_LEAST_WINDOWS, LEAST_MEASURED, LEAST_ROWS, MeasuredWindows
from ..planning.plan import Plan
from ..runtime.log import logger
from ..settings.runtime import Runtime
from .closure import needs_closure


def build_measured_windows(
    runtime: Runtime, plan: BasePlan, objective: Objective, optimizer: Optimizer, *, is_sharded: bool
) -> MeasuredWindows:
    """Return the windows to measure. If there are none, they have the reason, which is also logged, and a remedy."""
    reason = (
        _of_setting(runtime)
        or _of_loss(objective)
        or _of_run(plan, optimizer, is_sharded=is_sharded)
        or _of_length(runtime.noise_scale, plan.n_windows)
    )
    if reason is not None:
        logger.debug(f"The gradient noise scale is not measured: {reason}.")
        return MeasuredWindows(reason=reason)
    return MeasuredWindows(_every(runtime.noise_scale), plan.seed)


def repeated_rows(plan: BasePlan) -> int | None:
    """Return the number of rows that each epoch goes through; None if an epoch draws its rows, or for a stream."""
    return plan.n_rows if isinstance(plan, Plan) and not plan.classes else None


def _every(noise_scale: int | str) -> int:
    return AUTO_EVERY if isinstance(noise_scale, str) else noise_scale


def _of_setting(runtime: Runtime) -> str | None:
    """Return why the settings do not ask for a measurement; None if they do."""
    if runtime.noise_scale is False:
        return "`noise_scale` is False. To measure it, train with `noise_scale='auto'`"
    if runtime.noise_scale == "auto" and runtime.deterministic:
        why = "`noise_scale` is 'auto', which measures nothing with `deterministic`"
        return f"{why}. Give the number of updates from one measurement to the next, such as `noise_scale={AUTO_EVERY}`"
    return None


def _of_length(noise_scale: int | str, n_windows: int) -> str | None:
    """Return why a run of this length is not measured; None if it is."""
    every = _every(noise_scale)
    smaller = max(1, n_windows // (2 * LEAST_MEASURED))
    is_short = noise_scale == "auto" and n_windows < AUTO_LEAST_WINDOWS
    if n_windows < LEAST_MEASURED and (is_short or n_windows < every):
        auto = f", and 'auto' {AUTO_LEAST_WINDOWS}" if is_short else ""
        return f"the run has {n_windows} updates. An estimate needs at least {LEAST_MEASURED}{auto}. Train longer"
    if is_short:
        why = f"the run has {n_windows} updates, and `noise_scale` 'auto' needs {AUTO_LEAST_WINDOWS}"
    elif n_windows < every:
        why = f"the run has {n_windows} updates, and the first measurement would be at update {every}"
    else:
        return None
    return f"{why}. Train with `noise_scale={smaller}`, the number of updates from one measurement to the next"


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
        return "the model is sharded. Train without sharding if it fits into the memory of a device"
    if needs_closure(optimizer):
        return "the optimizer computes the gradient of an update several times"
    largest = max(sizes.effective_batch_size for _, sizes in plan.batch_sizes.stages())
    if largest < LEAST_ROWS:
        return f"an update has {largest} rows, fewer than {LEAST_ROWS}. Give a larger `effective_batch_size`"
    return None
