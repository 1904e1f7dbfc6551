"""A run's windows, and how they will be cut, from its settings and its data."""

import math
from dataclasses import replace

from accelerate import Accelerator

from ..data.dataset import mean_length
from ..data.iterable import Stream, StreamRows
from ..errors import DataError, InexactLossError, InexactLossWarning, PaddingWarning, warn_user
from ..objective.report import ExactnessReport
from ..planning.batch_size import BatchSizes, batch_sizes_of
from ..planning.course import BasePlan
from ..planning.micro_batches import DEFAULT_COSTS, BatchLimits, CostModel, MicroBatchPlanner
from ..planning.plan import Plan
from ..planning.stream_plan import StreamPlan
from ..runtime.process_group import ProcessGroup
from ..settings import Recipe, Runtime
from .batch_size_finder import largest_batch
from .build_data import TrainingData, build_data
from .components import Components


def build_data_and_plan(
    components: Components,
    recipe: Recipe,
    runtime: Runtime,
    accelerator: Accelerator,
    process_group: ProcessGroup,
    stream: Stream | None,
) -> tuple[TrainingData, BasePlan, Runtime]:
    """What a run trains on, its windows, and the settings that its physical batch and its loss leave.

    Args:
        stream: of the training data, where they are one.

    Raises:
        DataError, SettingsError: whatever shows before the first update.

    Warns:
        InexactLossWarning, PaddingWarning: see `on_inexact`.
    """
    n_processes = accelerator.num_processes
    if not recipe.tokens_per_update and runtime.batch_size != "auto":
        batch_sizes_of(recipe, runtime, n_processes)  # sizes that disagree are told before the data are looked at
    data = build_data(components, recipe, runtime, accelerator, stream)
    length = mean_length(data.train_rows) if recipe.tokens_per_update else None
    if runtime.batch_size == "auto":
        wanted = batch_sizes_of(recipe, replace(runtime, batch_size=1), n_processes, length).effective_batch_size
        at_most = math.ceil(wanted / n_processes)
        size = largest_batch(
            components.model, data.objective, data.train, accelerator, process_group, at_most,
            wide=runtime.accumulate_in_fp32,
        )  # fmt: skip
        runtime = replace(runtime, batch_size=size)
    batch_sizes = batch_sizes_of(recipe, runtime, n_processes, length)
    report = data.objective.report
    runtime = fit_to_loss(runtime, batch_sizes, report)
    if accumulates(runtime, batch_sizes):
        _tell(report, runtime.on_inexact, accelerator.is_main_process)
    n_validation = 0 if data.val_rows is None else len(data.val_rows)
    rows = data.train_rows
    if isinstance(rows, StreamRows):
        assert recipe.max_updates is not None, "checked with the parts"
        stream_plan = StreamPlan(
            recipe.n_epochs, batch_sizes, recipe.max_updates, rows.take, recipe.random_seed, n_validation,
            recipe.remainder, recipe.learning_rate_scaling,
        )  # fmt: skip
        return data, stream_plan, runtime
    plan = Plan(
        len(rows), recipe.n_epochs, batch_sizes, recipe.random_seed, n_validation,
        recipe.remainder, recipe.max_updates, recipe.learning_rate_scaling,
    )  # fmt: skip
    _refuse_single_rows(data, plan, micro_batch_planner(runtime, batch_sizes))
    return data, plan, runtime


def micro_batch_planner(runtime: Runtime, batch_sizes: BatchSizes) -> MicroBatchPlanner:
    rows = batch_sizes.batch_size if runtime.max_tokens is None else None
    given = DEFAULT_COSTS if runtime.planner_costs is None else CostModel(*runtime.planner_costs)
    return MicroBatchPlanner(
        BatchLimits(rows, runtime.max_tokens),
        given if runtime.planner else None,
        batch_sizes.num_processes,
        runtime.padding_free,
    )


def how_cut(runtime: Runtime, batch_sizes: BatchSizes, knows_lengths: bool) -> str:
    """The line of the banner that says what a micro-batch may hold, and what is done with that freedom."""
    most = f"{batch_sizes.batch_size} rows" if runtime.max_tokens is None else f"{runtime.max_tokens} tokens"
    found = ", as many as fit or an update has" if runtime.batch_size == "auto" else ""
    layout = "; rows one behind the other, without padding" if runtime.padding_free else ""
    # Where all rows are as wide as the longest, or nobody knows, full micro-batches cost least.
    cut = "where it costs least" if runtime.planner and knows_lengths else "in the order of arrival"
    line = f"Micro-batches: at most {most}{found}; windows cut {cut}{layout}"
    if runtime.max_tokens is not None and batch_sizes.gradient_accumulation_steps == 1 and not batch_sizes.later:
        rows = batch_sizes.effective_batch_size
        line += f"\nNote: an update has {rows} rows, by `batch_size`; `effective_batch_size` makes it larger"
    return line


def fit_to_loss(runtime: Runtime, batch_sizes: BatchSizes, report: ExactnessReport) -> Runtime:
    """Without the planner where it would make a difference: the rows of a micro-batch, as the user sized it, stay
    together where a loss mixes them, or where one micro-batch is the whole update of an inexact one."""
    whole = bool(report.inexact()) and not accumulates(replace(runtime, planner=False), batch_sizes)
    return replace(runtime, planner=False) if report.mixes_rows or whole else runtime


def accumulates(runtime: Runtime, batch_sizes: BatchSizes) -> bool:
    """Whether an update can take more than one micro-batch."""
    largest = max(sizes.effective_batch_size for _, sizes in batch_sizes.stages())
    return runtime.planner or runtime.max_tokens is not None or largest > batch_sizes.batch_size


def _tell(report: ExactnessReport, on_inexact: str, is_main: bool) -> None:
    """Raises or warns as the user wants it, where accumulating the loss is not exact."""
    sentences = report.inexact()
    if sentences and on_inexact == "error":
        raise InexactLossError([*sentences, "`on_inexact='warn'` trains all the same."])
    if not is_main or on_inexact == "ignore":
        return
    for sentence in sentences:
        warn_user(sentence, InexactLossWarning)
    if padding := report.padding():
        warn_user(padding, PaddingWarning)


def _refuse_single_rows(data: TrainingData, plan: Plan, planner: MicroBatchPlanner) -> None:
    """Raises DataError where a model that takes no single row in train mode is going to get one: in the first or the
    last window of the first epoch, or in the last one of the run."""
    complaint = data.objective.report.in_training.complaint
    if complaint is None:
        return
    epochs = [epoch for epoch in plan.epochs if plan.n_windows_of(epoch)]
    first, *others = plan.windows(epochs[0])
    *_, last = plan.windows(epochs[-1])
    for window in (first, *others[-1:], last):
        shares = data.train.cut(window.rows, planner)
        sizes = [len(piece.rows) for share in shares for piece in share]
        if 1 in sizes:
            carry = "" if plan.remainder == "carry" else ", or give `remainder='carry'`"
            left_over = f"Choose `batch_size` and the size of an update so that none is left over, drop a row{carry}."
            raise DataError(
                f"In train mode the model takes no micro-batch of a single row ({complaint}), and those of update "
                f"{window.index + 1} have {', '.join(map(str, sizes))}. "
                + ("Give a `batch_size` of 2 at least." if planner.limits.rows == 1 else left_over)
            )
