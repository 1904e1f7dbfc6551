"""The sizes of updates, and the planner that cuts their windows, resolved from the settings and the data."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from accelerate import Accelerator

from ..data.dataset import mean_tokens
from ..errors import DataError, LossScaleWarning, warn_user
from ..objective.report import ExactnessReport
from ..objective.warn_inexact import warn_if_inexact
from ..planning.base_plan import BasePlan
from ..planning.batch_size import BatchSizes, batch_sizes_of
from ..planning.micro_batches import DEFAULT_COSTS, BatchLimits, CostModel, MicroBatchPlanner
from ..runtime.gradients.plain import GradientStrategy
from ..runtime.process_group import ProcessGroup
from ..settings.recipe import Recipe
from ..settings.runtime import Runtime
from .batch_size_finder import largest_batch
from .build_data import TrainingData
from .config import RunConfig
from .token_cap import token_cap

_FOUND = "the most that fit in memory or in an update"
_MOST_STEPS = 64  # a larger ratio of two losses is a whole number by chance, unless it is the run's own k


def check_batch_sizes(recipe: Recipe, runtime: Runtime, num_processes: int) -> None:
    """Raise SettingsError if the sizes of an update contradict each other, as far as can be checked without data."""
    if not recipe.tokens_per_update and isinstance(runtime.batch_size, int):
        batch_sizes_of(recipe, runtime.batch_size, num_processes)


def build_batch_sizes(
    config: RunConfig,
    data: TrainingData,
    accelerator: Accelerator,
    process_group: ProcessGroup,
    known: int | None,
    sharded: Callable[[], GradientStrategy | None] = lambda: None,
) -> BatchSizes:
    """Resolve the sizes of a run's updates; measure the physical batch size if it is "auto".

    Args:
        known: the physical batch size that "auto" was resolved to before the run was resumed, if any.
        sharded: returns the strategy that has sharded the model; None if it is whole.
    """
    recipe, size, processes = config.recipe, config.runtime.batch_size, accelerator.num_processes
    length = mean_tokens(data.train_rows) if recipe.tokens_per_update else None
    if not isinstance(size, int):
        rows = batch_sizes_of(recipe, 1, processes, length).effective_batch_size
        size = known or largest_batch(
            config.components.model,
            data.objective,
            data.train,
            accelerator,
            process_group,
            at_most=math.ceil(rows / processes),
            wide=config.runtime.accumulate_in_fp32,
            sharded=sharded(),
        )
    return batch_sizes_of(recipe, size, processes, length)


def build_planner(runtime: Runtime, batch_sizes: BatchSizes, data: TrainingData) -> MicroBatchPlanner:
    """Return the planner that cuts windows into micro-batches.

    It keeps micro-batches at the size that the user chose if the loss compares rows, or if the loss is inexact and one
    micro-batch is a whole update.

    Raises:
        SettingsError: if `max_tokens` is "auto" and the loss compares rows, which more rows would change.
    """
    report = data.objective.report
    whole = bool(report.inexact()) and not _splits(runtime, batch_sizes)
    costs = DEFAULT_COSTS if runtime.planner_costs is None else CostModel(*runtime.planner_costs)
    tokens = token_cap(runtime, batch_sizes.batch_size, data.longest, report)
    return MicroBatchPlanner(
        BatchLimits(batch_sizes.batch_size if tokens is None else None, tokens),
        costs if runtime.planner and not (report.mixes_rows or whole) else None,
        batch_sizes.num_processes,
        runtime.padding_free,
    )


def report_inexact(
    report: ExactnessReport, runtime: Runtime, batch_sizes: BatchSizes, planner: MicroBatchPlanner, *, is_main: bool
) -> None:
    """Raise or warn, as `on_inexact` says, if updates take several micro-batches and accumulation is not exact."""
    if planner.costs is None and not _splits(runtime, batch_sizes):
        return
    warn_if_inexact(report, runtime.on_inexact, is_main=is_main)


def report_loss_scale(divisor: int | None, steps: Collection[int], name: str = "loss_fn") -> None:
    """Warn if `loss_fn` is smaller than the model's own loss by a whole number that may be the accumulation steps.

    Args:
        divisor: the number by which the loss is smaller, if it is a whole number.
        steps: the accumulation steps of the run.
        name: how the message calls the loss.
    """
    if divisor is None or (divisor not in steps and divisor > _MOST_STEPS):
        return
    same = ", and this run accumulates that many micro-batches" if divisor in steps else ""
    warn_user(
        f"`{name}` returns 1/{divisor} of the model's own loss on the same rows{same}. If it divides by the "
        "accumulation steps, remove the division: ftaccum averages over the whole update, so the gradient is "
        f"{divisor} times too small.",
        LossScaleWarning,
    )


def refuse_single_rows(data: TrainingData, plan: BasePlan, planner: MicroBatchPlanner) -> None:
    """Raise DataError if a model that cannot process a single row in train mode would get one.

    Only check the first and the last window of the first epoch, and the last window of the run.
    """
    complaint = data.objective.report.in_training.complaint
    if complaint is None:
        return
    for window in plan.sample_windows():
        by_process = data.train.cut(window.rows, planner)
        sizes = [len(piece.rows) for pieces in by_process for piece in pieces]
        if 1 not in sizes:
            continue
        carry = "" if plan.remainder == "carry" else ", or give `remainder='carry'`"
        left_over = f"Choose `batch_size` and the update size so that no single row is left over. Or drop a row{carry}."
        raise DataError(
            f"In train mode, the model cannot process a micro-batch of a single row ({complaint}), but the "
            f"micro-batches of update {window.index + 1} have these numbers of rows: {', '.join(map(str, sizes))}. "
            + ("Use a `batch_size` of at least 2." if planner.limits.rows == 1 else left_over)
        )


@dataclass(frozen=True)
class MicroBatchSummary:
    """The limits of a micro-batch, and how updates are split.

    Attributes:
        rows: `batch_size`: the most rows, unless `tokens` limits a micro-batch.
        tokens: the most tokens; None if `rows` limits a micro-batch.
        is_measured: whether `batch_size` was measured.
        follows_rows: whether `tokens` is the size of `rows` of the longest rows.
        minimizes_cost: whether the planner splits updates so that they cost least.
        padding_free: whether rows are concatenated.
    """

    rows: int
    tokens: int | None
    is_measured: bool
    follows_rows: bool
    minimizes_cost: bool
    padding_free: bool

    def __str__(self) -> str:
        layout = "; rows concatenated, without padding" if self.padding_free else ""
        order = "to minimize its estimated cost" if self.minimizes_cost else "in order of arrival"
        return f"at most {self._most()}; each update is split {order}{layout}"

    def _most(self) -> str:
        if self.tokens is None:
            return f"{self.rows} rows" + (f" ({_FOUND})" if self.is_measured else "")
        if not self.follows_rows:
            return f"{self.tokens} tokens"
        found = f", {_FOUND}," if self.is_measured else ""
        return f"{self.tokens} tokens (batch_size {self.rows}{found} × longest row {self.tokens // self.rows})"


def summarize_micro_batches(
    runtime: Runtime, batch_sizes: BatchSizes, planner: MicroBatchPlanner, *, knows_lengths: bool
) -> MicroBatchSummary:
    """Return the limits of a micro-batch, and how updates are split."""
    return MicroBatchSummary(
        batch_sizes.batch_size,
        planner.limits.tokens,
        is_measured=runtime.batch_size == "auto",
        follows_rows=runtime.limits_tokens_automatically,
        # If all rows are as wide as the longest, or lengths are unknown, full micro-batches cost least.
        minimizes_cost=planner.costs is not None and knows_lengths,
        padding_free=runtime.padding_free,
    )


def describe_cut(runtime: Runtime, batch_sizes: BatchSizes, planner: MicroBatchPlanner, *, knows_lengths: bool) -> str:
    """Return the banner's lines about the limits of a micro-batch and how updates are split."""
    line = f"Micro-batches: {summarize_micro_batches(runtime, batch_sizes, planner, knows_lengths=knows_lengths)}"
    if runtime.max_tokens is not None and batch_sizes.gradient_accumulation_steps == 1 and not batch_sizes.later:
        rows = batch_sizes.effective_batch_size
        line += f"\nNote: an update has {rows} rows, as `batch_size` says; set `effective_batch_size` for more"
    return line


def _splits(runtime: Runtime, batch_sizes: BatchSizes) -> bool:
    """Return whether an update takes more than one micro-batch even without the planner."""
    largest = max(sizes.effective_batch_size for _, sizes in batch_sizes.stages())
    # A cap of "auto" holds any `batch_size` rows.
    return runtime.token_limit is not None or largest > batch_sizes.batch_size
