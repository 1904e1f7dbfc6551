"""Milestones, where trials are compared: the updates of every candidate end there."""

import itertools
import math

import pytest

from ftaccum.apps.search.report_steps import milestones
from ftaccum.planning.batch_size import BatchSizes
from ftaccum.planning.plan import Plan


def ends_of_updates(n_rows: int, n_epochs: int, batch_size: int) -> set[int]:
    plan = Plan(n_rows, n_epochs, BatchSizes(1, batch_size, 1, batch_size))
    return {plan.rows_after(n) for n in range(1, plan.n_windows + 1)}


@pytest.mark.parametrize("n_reports", [1, 3, 8])
@pytest.mark.parametrize("n_epochs", [1, 2, 3])
def test_every_candidate_ends_an_update_at_every_milestone(n_epochs: int, n_reports: int) -> None:
    for n_rows, batch_sizes in itertools.product((7, 64, 100, 257), ((4,), (4, 8), (4, 8, 16, 32), (2, 6))):
        found = milestones(n_rows, n_epochs, batch_sizes, n_reports)
        common = set.intersection(*(ends_of_updates(n_rows, n_epochs, b) for b in batch_sizes))
        assert set(found) <= common, (n_rows, batch_sizes)
        assert max(found) == n_epochs * n_rows
        assert list(found) == sorted(found)
        assert len(found) <= n_reports


def test_milestones_are_as_near_to_equal_shares_as_updates_allow() -> None:
    found = milestones(n_rows=1000, n_epochs=2, batch_sizes=(8, 16, 32, 64), n_reports=8)
    assert len(found) == 8
    for number, rows in enumerate(found, start=1):
        assert abs(rows - number * 250) <= 32
    assert list(found.values()) == [250 * number for number in range(1, 9)]


def test_steps_are_multiples_of_the_first_so_that_halving_meets_them() -> None:
    steps = list(milestones(6000, 1, (8, 16, 32, 64), 8).values())
    assert all(step % steps[0] == 0 for step in steps)


def test_batches_without_a_common_multiple_within_a_share_meet_at_the_largest() -> None:
    batch_sizes = [4 * k for k in range(1, 9)]
    assert math.lcm(*batch_sizes) > 1000 / 8
    found = milestones(1000, 1, batch_sizes, 8)
    assert all(rows % 32 == 0 for rows in found if rows < 1000)
    for batch_size in batch_sizes:
        ends = sorted(ends_of_updates(1000, 1, batch_size))
        for rows in found:
            assert 0 <= next(end for end in ends if end >= rows) - rows < batch_size
