"""Laws of plans, on pure integers: sizes, streams, resumed plans, limits and descriptions."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ftaccum.errors import SettingsError
from ftaccum.planning.base_plan import Progress
from ftaccum.planning.batch_size import BatchSizes, batch_sizes_of, rate_factor
from ftaccum.planning.micro_batches import BatchLimits, CostModel, MicroBatchPlanner, MicroBatchRows
from ftaccum.planning.plan import Plan
from ftaccum.planning.shuffle import hold_out, n_held_out, order_of
from ftaccum.planning.stream_plan import StreamPlan
from ftaccum.settings.recipe import Recipe

LATER = ((2, 3), (4, 1))


def stream(epochs: list[int], size: int, **more: Any) -> StreamPlan:
    """Return the plan of a stream that yields this many rows in each epoch."""
    left = list(epochs)

    def read(epoch: int, n: int, start: int) -> int:  # noqa: ARG001
        assert n > 0
        came = min(n, left[epoch])
        left[epoch] -= came
        return came

    sizes = {"max_updates": 99, "read": read} | more
    return StreamPlan(len(epochs), BatchSizes(size, 1, 1, size), **sizes)


def resumed(plan: Plan, rows: list[int], n_rows: int) -> tuple[Plan, int]:
    """Return the plan after windows of these sizes, and the epoch that continues."""
    return plan.resume_after(Progress(rows, last_epoch=0, n_rows=n_rows, max_updates=None))


def windows_of(plan: StreamPlan) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(w.index, w.epoch, w.rows) for epoch in plan.epochs for w in plan.windows(epoch)]


def test_sizes_of_an_update_change_at_the_updates_named() -> None:
    sizes = BatchSizes(4, 2, 3, 24, LATER)
    found = [sizes.at(update) for update in range(6)]
    assert found == [BatchSizes(4, k, 3, 12 * k) for k in (2, 2, 3, 3, 1, 1)]
    assert sizes.stages() == [(0, found[0]), (2, found[2]), (4, found[4])]
    assert BatchSizes(4, 2, 3, 24).stages() == [(0, BatchSizes(4, 2, 3, 24))]
    assert BatchSizes(4, 2, 3, 23).at(7) == BatchSizes(4, 2, 3, 23)


def test_pairs_of_steps_are_resolved() -> None:
    found = batch_sizes_of(Recipe(gradient_accumulation_steps=((0, 2), *LATER)), 4, 3)
    assert found == BatchSizes(4, 2, 3, 24, LATER)


def test_tokens_of_an_update_are_rounded_to_the_nearest_row_and_one_at_least() -> None:
    def rows(tokens: int, per_row: float) -> int:
        return batch_sizes_of(Recipe(tokens_per_update=tokens), 2, 1, per_row).effective_batch_size

    assert [rows(100, 30.0), rows(110, 30.0), rows(1, 30.0)] == [3, 4, 1]


def test_two_settings_that_agree_on_the_rows_do_not_conflict() -> None:
    found = batch_sizes_of(Recipe(effective_batch_size=8, tokens_per_update=81), 2, 1, 10.0)
    assert found == BatchSizes(2, 4, 1, 8)
    steps = batch_sizes_of(Recipe(gradient_accumulation_steps=4, effective_batch_size=7), 2, 1)
    assert steps == BatchSizes(2, 4, 1, 7)
    with pytest.raises(SettingsError, match=r"disagree: `effective_batch_size` asks for 9 rows; .*= 8 rows\. Give one"):
        batch_sizes_of(Recipe(gradient_accumulation_steps=4, effective_batch_size=9), 2, 1)


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("sqrt", 3.0), ("linear", 9.0)])
def test_rates_grow_with_the_batch(rule: str, factor: float) -> None:
    assert rate_factor(rule, 9.0) == factor


@pytest.mark.parametrize(
    ("n", "share", "held"), [(10, 0.0, 0), (10, 0.1, 1), (10, 0.01, 1), (10, 0.26, 3), (2, 0.5, 1)]
)
def test_rows_held_out(n: int, share: float, held: int) -> None:
    assert n_held_out(n, share) == held
    train, validation = hold_out(n, share, seed=3)
    assert sorted(train + validation) == list(range(n))
    assert (len(validation), list(train)) == (held, sorted(train))
    assert list(validation) == sorted(validation)


@pytest.mark.parametrize(("n", "share"), [(1, 0.1), (1, 1.0), (4, 1.0)])
def test_a_hold_out_of_all_rows_is_an_error(n: int, share: float) -> None:
    with pytest.raises(SettingsError, match=f"`validation_split` is {share}, which leaves none of {n} rows"):
        n_held_out(n, share)


def test_draws_of_the_seed_match_recorded_values() -> None:
    """A resumed run must find its rows again, so a change here breaks every run in progress."""
    assert order_of(0, 6, 42) == [5, 3, 1, 2, 0, 4]
    assert order_of(1, 6, 42) == [5, 0, 2, 1, 4, 3]
    assert hold_out(6, 0.34, 42) == ((0, 1, 2, 4), (3, 5))


def test_warm_up_is_given_in_updates_or_as_a_share_rounded_up() -> None:
    plan = Plan(30, 3, BatchSizes(4, 1, 1, 4))
    assert plan.n_windows == 24
    assert [plan.warmup_updates(0, ratio) for ratio in (0.0, 0.1, 0.125, 1.0)] == [0, 3, 3, 24]
    assert plan.warmup_updates(5, 0.5) == 5


@pytest.mark.parametrize("remainder", ["flush", "carry"])
@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("epochs", [[5], [5, 7], [4, 4, 4], [1, 1, 1, 1], [8, 0, 3]])
@pytest.mark.parametrize("max_updates", [1, 2, 99])
def test_a_stream_is_cut_into_windows_in_its_order(
    remainder: str, size: int, epochs: list[int], max_updates: int
) -> None:
    plan = stream(epochs, size, remainder=remainder, max_updates=max_updates)
    found = windows_of(plan)
    if 0 in epochs:
        epochs = epochs[: epochs.index(0)]  # a stream that cannot be repeated
    ends: list[tuple[int, int]] = []  # for each window: the rows read by its end, and its epoch
    total = 0
    for epoch, n in enumerate(epochs):
        first = total if remainder == "flush" else 0
        total += n
        start = ends[-1][0] if ends else 0
        ends += [(end, epoch) for end in range(max(first, start) + size, total + 1, size)]
        is_last = epoch + 1 == len(epochs)
        if (remainder == "flush" or is_last) and (ends[-1][0] if ends else 0) < total:
            ends.append((total, epoch))
    ends = ends[:max_updates]
    starts = [0, *(end for end, _ in ends[:-1])]
    wanted = [(n, epoch, tuple(range(a, b))) for n, (a, (b, epoch)) in enumerate(zip(starts, ends, strict=True))]
    assert found == wanted
    assert [plan.n_windows_of(e) for e in range(4)] == [sum(epoch == e for _, epoch in ends) for e in range(4)]
    assert (plan.shortfall() is None) == (len(found) == max_updates)
    assert plan.n_windows == max_updates


def test_windows_of_a_stream_before_the_start_are_read_and_skipped() -> None:
    plan = stream([5], 2)
    (epoch,) = [e for e in plan.epochs if not (found := [w.index for w in plan.windows(e, 1)]) or found == [1, 2]]
    assert epoch == 0
    every = stream([5], 2)
    assert [w.index for e in every.epochs for w in every.windows(e)] == [0, 1, 2]


def test_a_stream_is_asked_only_for_the_rows_that_a_window_still_needs() -> None:
    asked: list[tuple[int, int, int]] = []

    def read(epoch: int, n: int, done: int) -> int:
        asked.append((epoch, n, done))
        return n

    plan = StreamPlan(1, BatchSizes(3, 1, 1, 3), 3, read)
    assert [rows for _, _, rows in windows_of(plan)] == [(0, 1, 2), (3, 4, 5), (6, 7, 8)]
    assert asked == [(0, 1, 0), (0, 2, 0), (0, 3, 0), (0, 3, 3)]


def test_a_stream_knows_how_many_rows_each_window_ended_after() -> None:
    plan = stream([5, 3], 2)
    assert [len(rows) for _, _, rows in windows_of(plan)] == [2, 2, 1, 2, 1]
    assert [plan.rows_after(n) for n in range(6)] == [0, 2, 4, 5, 7, 8]


def test_updates_of_a_stream_grow_where_k_does() -> None:
    plan = stream([99], 1, max_updates=6)
    plan.batch_sizes = BatchSizes(1, 2, 1, 2, LATER)
    assert [len(rows) for _, _, rows in windows_of(plan)] == [2, 2, 3, 3, 1, 1]
    assert plan.notes() == []


def test_a_stream_describes_itself() -> None:
    assert str(stream([5], 2, max_updates=7)) == (
        "Training samples: a stream\nBatch size: 2\nGradient accumulation steps: 1\nProcesses: 1\n"
        "Effective batch size: 2\nUpdates: 7 (`max_updates`), or fewer if the stream ends first (1 pass)"
    )
    text = str(stream([5, 5], 2, max_updates=7, remainder="carry", n_validation_rows=3))
    assert text.endswith(
        "or fewer if the stream ends first (2 passes)\n"
        "Updates per epoch: not known beforehand; rows left over are carried into the next epoch\nValidation samples: 3"
    )
    assert "rows left over make a smaller update" in str(stream([5, 5], 2))


def test_a_stream_that_ends_early_reports_how_early() -> None:
    plan = stream([5], 2)
    windows_of(plan)
    assert str(plan.shortfall()).startswith("The stream ended after 3 updates, but `max_updates` is 99,")


def test_a_plan_resumes_after_windows_of_other_sizes() -> None:
    plan = Plan(10, 2, BatchSizes(4, 1, 1, 4))
    assert resumed(plan, [], 10) == (plan, 0)
    assert resumed(plan, [4, 4], 10) == (plan, 0)
    assert resumed(plan, [4, 4, 2], 10) == (plan, 1)
    assert resumed(plan, [4, 4, 2, 4, 4, 2], 10) == (plan, 2)
    other, epoch = resumed(plan, [3, 3], 10)
    assert (other.done, epoch) == ((3, 6), 0)
    ends = [(0, 3), (3, 6), (6, 10)]
    assert [w.rows for w in other.windows(0)] == [tuple(order_of(0, 10, 42)[a:b]) for a, b in ends]
    assert resumed(other, [3, 3, 4, 4], 10) == (other, 1)
    # In an epoch of twice as many rows, the same number of rows is done, not the same share.
    longer, epoch = resumed(Plan(20, 2, BatchSizes(4, 1, 1, 4)), [4, 4, 2, 4], 10)
    assert (longer.done, epoch) == ((6, 13, 17, 24), 1)
    shorter, epoch = resumed(Plan(3, 4, BatchSizes(4, 1, 1, 4)), [4, 4, 2, 4], 10)
    assert (shorter.done[-1], epoch) == (6, 2)
    # Equal windows over a different number of rows are different windows.
    assert resumed(Plan(11, 2, BatchSizes(4, 1, 1, 4)), [4, 4], 10)[0].done == (4, 8)


def test_a_stream_continues_in_an_epoch_that_max_updates_had_cut() -> None:
    plan = stream([9, 9], 2, max_updates=4)

    def epoch(n_done: int, max_updates: int | None) -> int:
        same, found = plan.resume_after(Progress([2] * n_done, last_epoch=1, n_rows=4, max_updates=max_updates))
        assert same is plan
        return found

    assert epoch(3, 3) == 1
    assert [epoch(3, 5), epoch(3, None), epoch(4, 4), epoch(5, 5)] == [2] * 4, "nothing is left"


def test_epochs_and_rows_after_windows() -> None:
    plan = Plan(10, 2, BatchSizes(4, 1, 1, 4))
    assert [plan.rows_after(n) for n in range(7)] == [0, 4, 8, 10, 14, 18, 20]
    assert [plan.epoch_after(n) for n in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    assert [plan.ends_epoch(n) for n in range(1, 7)] == [False, False, True, False, False, True]
    short = Plan(10, 2, BatchSizes(4, 1, 1, 4), max_updates=2)
    assert [short.epoch_after(n) for n in range(3)] == [0, 0, 2]


def test_windows_from_a_start_onwards() -> None:
    plan = Plan(10, 2, BatchSizes(4, 1, 1, 4))
    assert [[w.index for w in plan.windows(epoch, 4)] for epoch in (0, 1)] == [[], [4, 5]]
    assert [[w.index for w in plan.windows(epoch)] for epoch in (0, 1)] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("rows", "epochs", "size", "most", "allowed"),
    [
        (10**8, 1, 1, None, True), (10**8 + 1, 1, 1, None, False), (10**8 + 1, 1, 2, None, True),
        (1, 10**8, 1, None, True), (1, 10**8 + 1, 1, None, False), (1, 10**9, 1, 10**8, True),
        (2**62, 2, 2**40, None, False), (2**62, 1, 2**40, None, True), (10**8, 2, 1, 10**8, True),
        (1, 10**9, 5, 10**8, False), (1, 10**9, 5, 2 * 10**7, True),
    ],
)  # fmt: skip
def test_plans_too_long_to_list_are_an_error(
    rows: int, epochs: int, size: int, most: int | None, allowed: bool
) -> None:
    make: Callable[[], Plan] = lambda: Plan(rows, epochs, BatchSizes(size, 1, 1, size), max_updates=most)
    if allowed:
        make()
        return
    with pytest.raises(SettingsError, match=rf"`n_epochs` is {epochs}, which over {rows} rows makes up to \d+ up"):
        make()


def test_updates_and_epochs_are_bounded_by_the_smallest_and_the_largest_size() -> None:
    growing = BatchSizes(1, 2, 1, 2, ((1, 5),))
    with pytest.raises(SettingsError, match=r"up to 150000000 updates in 3 epochs"):
        Plan(10**8, 3, growing)
    with pytest.raises(SettingsError, match=r"up to 100000000 updates in 500000000 epochs"):
        Plan(1, 10**9, growing, max_updates=10**8)


def test_notes_report_settings_that_a_plan_does_not_reach() -> None:
    def notes(*arguments: Any, **more: Any) -> list[str]:
        return Plan(*arguments, **more).notes()

    assert notes(10, 2, BatchSizes(4, 1, 1, 4)) == []
    assert notes(10, 2, BatchSizes(10, 1, 1, 10)) == []
    one_each = "Note: an epoch has only 10 rows, so an update has at most 10 rows instead of 11"
    assert notes(10, 2, BatchSizes(11, 1, 1, 11)) == [one_each]
    assert notes(10, 2, BatchSizes(11, 1, 1, 11), remainder="carry") == []
    late = "Note: the run ends before update 5, where `gradient_accumulation_steps` would change"
    assert notes(10, 1, BatchSizes(2, 1, 1, 2, ((5, 9), (7, 3)))) == [late]
    assert notes(10, 1, BatchSizes(2, 1, 1, 2, ((4, 2),))) == []
    early = "Note: the epochs end before `max_updates`, 6; increase `n_epochs` for more updates"
    assert notes(10, 1, BatchSizes(2, 1, 1, 2), max_updates=6) == [early]
    assert notes(10, 1, BatchSizes(2, 1, 1, 2), max_updates=5) == []


def line(plan: Plan, name: str) -> str:
    return next(line for line in str(plan).splitlines() if line.startswith(name)).removeprefix(f"{name}: ")


def test_a_plan_describes_how_many_updates_an_epoch_has() -> None:
    def updates(rows: int, epochs: int, sizes: BatchSizes, **more: Any) -> str:
        return line(Plan(rows, epochs, sizes, **more), "Updates per epoch")

    assert updates(8, 1, BatchSizes(2, 2, 1, 4)) == "2 (2 full windows)"
    tail = "3 (2 full windows; the remainder of 3 rows (micro-batches: 2) is flushed as 1 more)"
    assert updates(11, 1, BatchSizes(2, 2, 1, 4)) == tail
    flushed = "(a remainder is flushed at the end of each epoch)"
    assert updates(10, 2, BatchSizes(2, 1, 1, 2, ((5, 2),))) == f"5, 3 {flushed}"
    assert updates(10, 2, BatchSizes(2, 1, 1, 2, ((10, 2),))) == f"5 {flushed}"
    carried = "the remainder of an epoch is carried into the next"
    assert updates(3, 6, BatchSizes(2, 1, 1, 2), remainder="carry") == f"1, 2, 1, 2, 1, 2 ({carried})"
    assert updates(3, 8, BatchSizes(2, 1, 1, 2), remainder="carry") == f"1 to 2 ({carried})"
    assert updates(3, 7, BatchSizes(2, 1, 1, 2), remainder="carry") == f"1 to 2 ({carried}; the last window has 1 rows)"
    growing = BatchSizes(1, 2, 1, 2, ((1, 4),))
    assert updates(6, 1, growing, remainder="carry") == f"2 ({carried})"
    assert updates(5, 1, growing, remainder="carry") == f"2 ({carried}; the last window has 3 rows)"


def test_a_plan_describes_where_it_ends() -> None:
    sizes = BatchSizes(2, 1, 1, 2)
    assert line(Plan(4, 3, sizes), "Epochs") == "3, 6 updates in all"
    ended = "3, 3 updates in all (`max_updates`), the last of them in epoch 2"
    assert line(Plan(4, 3, sizes, max_updates=3), "Epochs") == ended
    assert line(Plan(4, 3, sizes, n_validation_rows=5), "Validation samples") == "5"
    assert "Validation" not in str(Plan(4, 3, sizes))


def test_a_plan_describes_how_sizes_and_rates_change() -> None:
    plan = Plan(99, 1, BatchSizes(2, 4, 3, 24, ((2, 9), (3, 1))), rate_scaling="sqrt")
    assert line(plan, "Gradient accumulation steps") == "4, after 2 updates 9, after 3 updates 1"
    assert line(plan, "Effective batch size") == "24, after 2 updates 54, after 3 updates 6"
    assert line(plan, "Learning rate factor") == "1, after 2 updates 1.5, after 3 updates 0.5"
    assert (line(plan, "Batch size"), line(plan, "Processes")) == ("2", "3")
    assert "Learning rate factor" not in str(Plan(99, 1, BatchSizes(2, 4, 3, 24, ((2, 9),))))


def test_a_lower_limit_of_tokens_wins() -> None:
    assert BatchLimits(3).of_tokens(10) == BatchLimits(3, 10)
    assert BatchLimits(3, 20).of_tokens(10) == BatchLimits(3, 10)
    assert BatchLimits(3, 5).of_tokens(10) == BatchLimits(3, 5)


def test_a_pass_costs_by_tokens_and_by_their_square() -> None:
    assert CostModel(5.0, 2.0, 0.5).of(12, 4) == 5 + 2 * 12 + 0.5 * 12 * 4
    assert CostModel(5.0, 2.0, 0.5).of(np.array([1, 2]), 2).tolist() == [8.0, 11.0]


def test_micro_batches_name_rows_and_their_places() -> None:
    assert MicroBatchRows.of((7, 8, 7, 9), (2, 3)) == MicroBatchRows((7, 9), 0, 0, (2, 3))
    (share,) = MicroBatchPlanner(BatchLimits(2)).split((7, 8, 7), [1, 5, 4])
    assert share == [MicroBatchRows((8, 7), 10, 5, (1, 2)), MicroBatchRows((7,), 1, 1, (0,))]
    (share,) = MicroBatchPlanner(BatchLimits(2), costs=None, packed=True).split((7, 8, 7), [1, 5, 4])
    assert share == [MicroBatchRows((7, 8), 6, 6, (0, 1)), MicroBatchRows((7,), 4, 4, (2,))]


def test_a_row_without_tokens_counts_as_one() -> None:
    (share,) = MicroBatchPlanner(BatchLimits(None, 3), costs=None).split((0, 1, 2, 3), [0, 0, 0, 0])
    assert [(piece.rows, piece.tokens, piece.width) for piece in share] == [((0, 1, 2), 3, 1), ((3,), 1, 1)]


def test_limits_are_filled_to_the_last_token() -> None:
    (share,) = MicroBatchPlanner(BatchLimits(None, 12), costs=None).split(tuple(range(7)), [4] * 7)
    assert [len(piece.rows) for piece in share] == [3, 3, 1]
    # Packed rows are not padded, so short ones fit after a long one.
    (share,) = MicroBatchPlanner(BatchLimits(None, 12), costs=None, packed=True).split(tuple(range(5)), [8, 1, 1, 2, 7])
    assert [piece.rows for piece in share] == [(0, 1, 2, 3), (4,)]


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("n_rows", [1, 2, 3, 5, 6, 7])
def test_dummy_micro_batches_give_processes_equal_numbers_of_passes(processes: int, n_rows: int) -> None:
    shares = MicroBatchPlanner(BatchLimits(1), num_processes=processes).split(tuple(range(n_rows)), [n_rows] * n_rows)
    assert {len(share) for share in shares} == {math.ceil(n_rows / processes)}
    dummies = [piece for share in shares for piece in share if not piece.rows]
    assert dummies == [MicroBatchRows()] * (-n_rows % processes)


def test_larger_micro_batches_go_to_processes_with_less_so_far() -> None:
    shares = MicroBatchPlanner(BatchLimits(1), num_processes=2).split((0, 1, 2, 3), [9, 5, 4, 2])
    assert [[piece.tokens for piece in share] for share in shares] == [[9, 2], [5, 4]]
