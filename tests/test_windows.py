"""Laws of windows that cross the end of an epoch, grow during training, or end before the epochs do."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from ftaccum.planning.batch_size import BatchSizes, rate_factor
from ftaccum.planning.plan import Plan

LATER: list[tuple[tuple[int, int], ...]] = [(), ((1, 3),), ((1, 2), (2, 1), (5, 4))]
CASES = [
    (n, epochs, b, k, later)
    for n in (1, 2, 3, 5, 8, 13)
    for epochs in (1, 2, 3)
    for b, k in ((1, 1), (2, 1), (3, 2), (4, 5))
    for later in LATER
]


def planned(n: int, epochs: int, b: int, k: int, later: tuple[tuple[int, int], ...], **more: object) -> Plan:
    return Plan(n, epochs, BatchSizes(b, k, 1, b * k, later), **more)  # type: ignore[arg-type]


def all_windows(plan: Plan) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(w.index, w.epoch, w.rows) for epoch in plan.epochs for w in plan.windows(epoch)]


def wanted(plan: Plan, update: int) -> int:
    """Return the number of rows of an update, as the argument's documentation defines it."""
    changes = [(0, plan.batch_sizes.gradient_accumulation_steps), *plan.batch_sizes.later]
    return plan.batch_sizes.batch_size * next(k for first, k in reversed(changes) if first <= update)


def flushed_as_ever(n: int, epochs: int, size: int, seed: int = 42) -> list[tuple[int, int, tuple[int, ...]]]:
    """Return plain windows: one size, and a shorter one at each epoch's end."""
    found = []
    for epoch in range(epochs):
        order = np.random.RandomState((seed, 1, epoch)).permutation(n)
        for start in range(0, n, size):
            found.append((len(found), epoch, tuple(order[start : start + size].tolist())))
    return found


@pytest.mark.parametrize("remainder", ["flush", "carry"])
def test_every_row_is_seen_once_an_epoch_in_the_order_of_the_seed(remainder: str) -> None:
    for case in CASES:
        plan = planned(*case, remainder=remainder)
        n, epochs = case[:2]
        seen = [row for _, _, rows in all_windows(plan) for row in rows]
        orders = [np.random.RandomState((42, 1, epoch)).permutation(n).tolist() for epoch in range(epochs)]
        assert seen == list(itertools.chain(*orders)), case
        assert set(Counter(seen).values()) == {epochs}


def test_without_carrying_or_growing_windows_are_plain_flushed_ones() -> None:
    for case in CASES:
        if not case[4]:
            plan = planned(*case)
            assert all_windows(plan) == flushed_as_ever(case[0], case[1], case[2] * case[3])
            assert plan.n_windows == case[1] * plan.n_windows_of(0)


def test_only_the_last_window_is_short_where_remainders_are_carried() -> None:
    for case in CASES:
        plan = planned(*case, remainder="carry")
        windows = all_windows(plan)
        assert all(len(rows) == wanted(plan, index) for index, _, rows in windows[:-1]), case
        assert 0 < len(windows[-1][2]) <= wanted(plan, windows[-1][0])


def test_a_flushed_window_is_short_only_at_its_epochs_end() -> None:
    for case in CASES:
        plan = planned(*case)
        for epoch in plan.epochs:
            *others, last = plan.windows(epoch)
            assert all(len(w.rows) == wanted(plan, w.index) for w in others), case
            assert len(last.rows) <= wanted(plan, last.index)


@pytest.mark.parametrize("remainder", ["flush", "carry"])
def test_windows_are_numbered_through_the_run_and_belong_to_their_last_rows_epoch(remainder: str) -> None:
    for case in CASES:
        plan = planned(*case, remainder=remainder)
        windows = all_windows(plan)
        assert [index for index, _, _ in windows] == list(range(plan.n_windows))
        ends = list(itertools.accumulate(len(rows) for _, _, rows in windows))
        assert [plan.rows_after(n + 1) for n in range(len(windows))] == ends
        assert plan.rows_after(0) == 0
        assert [epoch for _, epoch, _ in windows] == [(end - 1) // case[0] for end in ends]
        counts = Counter(epoch for _, epoch, _ in windows)
        assert [plan.n_windows_of(epoch) for epoch in range(case[1] + 1)] == [counts[e] for e in range(case[1] + 1)]
        last_ones = [
            n for n, (now, after) in enumerate(itertools.pairwise([*windows, (0, -1, ())])) if now[1] != after[1]
        ]
        assert [n for n in range(len(windows)) if plan.ends_epoch(n + 1)] == last_ones


@pytest.mark.parametrize("remainder", ["flush", "carry"])
def test_a_run_that_ends_early_has_the_same_windows_until_then(remainder: str) -> None:
    for case in CASES:
        whole = all_windows(planned(*case, remainder=remainder))
        for most in (1, 2, 3, len(whole), len(whole) + 1):
            plan = planned(*case, remainder=remainder, max_updates=most)
            assert all_windows(plan) == whole[:most], (case, most)
            assert plan.n_windows == min(most, len(whole))
            assert len(plan.epochs) == whole[plan.n_windows - 1][1] + 1


@pytest.mark.parametrize("remainder", ["flush", "carry"])
def test_a_plan_of_millions_of_windows_is_arithmetic(remainder: str) -> None:
    """It takes a tenth of a second; counting windows one by one would take two."""
    plan = Plan(1_000_003, 3, BatchSizes(1, 1, 1, 1, ((10, 2),)), remainder=remainder)
    started = time.process_time()
    assert "updates in all" in str(plan)
    assert time.process_time() - started < 1
    assert plan.rows_after(plan.n_windows) == 3_000_009


@pytest.mark.parametrize("remainder", ["flush", "carry"])
def test_a_run_that_starts_later_has_the_windows_from_there_on(remainder: str) -> None:
    for case in CASES:
        plan = planned(*case, remainder=remainder)
        whole = all_windows(plan)
        for start in {0, 1, 2, len(whole) // 2, len(whole) - 1, len(whole), len(whole) + 1}:
            found = [(w.index, w.epoch, w.rows) for e in plan.epochs for w in plan.windows(e, start)]
            assert found == whole[start:], (case, start)


@pytest.mark.parametrize("remainder", ["flush", "carry"])
def test_a_window_far_into_a_run_is_computed_without_reading_up_to_it(remainder: str) -> None:
    """It takes a hundredth of a second, for the order of its epoch. Reading window by window takes ten times that."""
    plan = Plan(100_000, 3, BatchSizes(4, 1, 1, 4), remainder=remainder)
    assert plan.n_windows == 75_000
    started = time.process_time()
    window = next(plan.windows(2, 60_000))
    assert time.process_time() - started < 0.1
    assert window.index == 60_000
    order = np.random.RandomState((42, 1, 2)).permutation(100_000)
    assert window.rows == tuple(order[40_000:40_004].tolist())


def test_an_epoch_may_have_no_window_and_a_window_a_row_more_than_once() -> None:
    plan = Plan(3, 5, BatchSizes(8, 1, 1, 8), remainder="carry")
    assert [plan.n_windows_of(epoch) for epoch in plan.epochs] == [0, 0, 1, 0, 1]
    (first,), (last,) = plan.windows(2), plan.windows(4)
    assert max(Counter(first.rows).values()) == 3
    assert (len(first.rows), len(last.rows)) == (8, 7)


def test_processes_and_the_physical_batch_do_not_change_growing_windows() -> None:
    later = ((2, 4), (5, 12))
    halved = tuple((update, k // 2) for update, k in later)
    one, two = BatchSizes(3, 2, 1, 6, later), BatchSizes(3, 1, 2, 6, halved)
    assert all_windows(Plan(31, 3, one, remainder="carry")) == all_windows(Plan(31, 3, two, remainder="carry"))


@pytest.mark.parametrize(("rule", "factors"), [("none", [1, 1, 1]), ("sqrt", [1, 2, 0.5]), ("linear", [1, 4, 0.25])])
def test_the_rate_follows_k(rule: str, factors: list[float]) -> None:
    plan = Plan(100, 1, BatchSizes(1, 4, 1, 4, ((2, 16), (4, 1))), rate_scaling=rule)
    assert [plan.rate_factor(update) for update in (0, 1, 2, 3, 4, 9)] == [f for f in factors[:2] for _ in "ab"] + [
        factors[2]
    ] * 2
    assert rate_factor("sqrt", 9.0) == 3.0
