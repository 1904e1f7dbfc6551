"""Laws of cutting windows: each row once, equal numbers of passes, within the caps, at the lowest cost."""

import itertools

import numpy as np
import pytest

from ftaccum.planning.micro_batches import BatchLimits, CostModel, MicroBatchPlanner, MicroBatchRows

LENGTHS = [9, 3, 14, 2, 2, 7, 30, 5, 6, 11, 2]
CUTTERS = [
    MicroBatchPlanner(BatchLimits(rows, tokens), costs, processes, packed)
    for rows in (1, 2, 4, None)
    for tokens in (None, 12, 40)
    for costs in (None, CostModel(64, 1, 0.001), CostModel(0, 1, 0))
    for processes in (1, 2, 3)
    for packed in (False, True)
]


def lengths_of(piece: MicroBatchRows) -> list[int]:
    return [LENGTHS[row] for row in piece.rows]


def size_of(rows: list[int] | tuple[int, ...], packed: bool) -> tuple[int, int]:
    """Return the tokens and the width of a micro-batch of rows with these lengths."""
    return (sum(rows), sum(rows)) if packed else (len(rows) * max(rows), max(rows))


@pytest.mark.parametrize("n_rows", [1, 2, 5, 11])
def test_shares_partition_a_window_and_have_equal_numbers_of_passes(n_rows: int) -> None:
    for planner in CUTTERS:
        shares = planner.split(tuple(range(n_rows)), LENGTHS[:n_rows])
        assert len(shares) == planner.num_processes
        assert len({len(share) for share in shares}) == 1
        dealt = [row for share in shares for piece in share for row in piece.rows]
        assert sorted(dealt) == list(range(n_rows))
        for passes in zip(*shares, strict=True):
            assert any(piece.rows for piece in passes), "a pass of dummies alone"


def test_caps_hold_except_for_a_single_row() -> None:
    for planner in CUTTERS:
        for share in planner.split(tuple(range(11)), LENGTHS):
            for piece in filter(lambda piece: piece.rows, share):
                assert (piece.tokens, piece.width) == size_of(lengths_of(piece), planner.packed)
                assert planner.limits.rows is None or len(piece.rows) <= planner.limits.rows
                assert planner.limits.tokens is None or piece.tokens <= planner.limits.tokens or len(piece.rows) == 1


def test_largest_micro_batches_come_first_and_the_smallest_are_synced() -> None:
    for planner in CUTTERS:
        rounds = list(zip(*planner.split(tuple(range(11)), LENGTHS), strict=True))
        largest = [max(piece.tokens for piece in pieces) for pieces in rounds]
        assert largest == sorted(largest, reverse=True)


def every_cut(lengths: list[int]) -> list[list[list[int]]]:
    """Yield all ways to cut rows, sorted by length, into runs."""
    n = len(lengths)
    cuts = []
    for marks in itertools.product([False, True], repeat=n - 1):
        ends = [i + 1 for i, mark in enumerate(marks) if mark] + [n]
        cuts.append([lengths[a:b] for a, b in zip([0, *ends], ends, strict=False)])
    return cuts


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("costs", [CostModel(20, 1, 0), CostModel(5, 1, 0.05), CostModel(1, 0, 1), CostModel(1, 0, 0)])
@pytest.mark.parametrize("limits", [BatchLimits(4), BatchLimits(None, 40), BatchLimits(3, 30)])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_no_cut_costs_less(processes: int, limits: BatchLimits, costs: CostModel, packed: bool) -> None:
    def allowed(run: list[int]) -> bool:
        tokens, _ = size_of(run, packed)
        return len(run) == 1 or (len(run) <= (limits.rows or 99) and tokens <= (limits.tokens or 999))

    def cost(runs: list[list[int]]) -> float:
        dummies = -len(runs) % processes
        return sum(costs.of(*size_of(run, packed)) for run in runs) + dummies * costs.per_pass

    best = min(cost(runs) for runs in every_cut(sorted(LENGTHS, reverse=True)) if all(map(allowed, runs)))
    shares = MicroBatchPlanner(limits, costs, processes, packed).split(tuple(range(11)), LENGTHS)
    found = [lengths_of(piece) for share in shares for piece in share if piece.rows]
    assert cost(found) == pytest.approx(best)


def test_micro_batches_have_few_long_rows_or_many_short_rows() -> None:
    draw = np.random.RandomState(0)
    lengths = np.clip(draw.lognormal(4.2, 0.9, size=64).astype(int), 4, 1000).tolist()

    def padded_per_real(costs: CostModel) -> float:
        (share,) = MicroBatchPlanner(BatchLimits(8), costs).split(tuple(range(64)), lengths)
        return sum(piece.tokens for piece in share) / sum(lengths)

    fewest_passes, cheapest = CostModel(1e9, 1, 0), CostModel(64, 1, 0.0005)
    assert padded_per_real(cheapest) < 1.08
    assert padded_per_real(fewest_passes) > 1.1


def test_without_costs_rows_are_sliced_in_the_order_of_arrival() -> None:
    (share,) = MicroBatchPlanner(BatchLimits(2), costs=None).split((3, 1, 4, 0, 2), [9, 3, 14, 2, 2])
    assert sorted(piece.rows for piece in share) == [(2,), (3, 1), (4, 0)]


def test_rows_of_one_length_keep_the_order_of_the_seed() -> None:
    (share,) = MicroBatchPlanner(BatchLimits(2)).split((3, 1, 4, 0), [5, 5, 5, 5])
    assert [piece.rows for piece in share] == [(3, 1), (4, 0)]
    assert [piece.rows for piece in MicroBatchPlanner(BatchLimits(2)).split((3, 1, 4, 0))[0]] == [(3, 1), (4, 0)]


def test_processes_are_given_equal_loads() -> None:
    draw = np.random.RandomState(1)
    lengths = np.clip(draw.lognormal(4, 0.7, size=256).astype(int), 4, 600).tolist()
    shares = MicroBatchPlanner(BatchLimits(8), num_processes=4).split(tuple(range(256)), lengths)
    loads = [sum(piece.tokens for piece in share) for share in shares]
    assert max(loads) < 1.03 * min(loads)
    for pieces in zip(*shares, strict=True):
        assert max(p.width for p in pieces) < 2 * min(p.width for p in pieces)
