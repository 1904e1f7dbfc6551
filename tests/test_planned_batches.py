"""Laws of planned batches: the windows of Accelerate's loader, with the same number of micro-batches, cut by length."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import (
    BatchSamplerShard,
    DataLoaderDispatcher,
    DataLoaderShard,
    SeedableRandomSampler,
    skip_first_batches,
)
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from ftaccum.bridges.trainer.planned_batches import PlannedBatches, plan_batches, row_lengths
from ftaccum.planning.micro_batches import BatchLimits, CostModel, MicroBatchPlanner

# A third of the rows are the longest. Without a limit, the cheapest cut would put many of them into one micro-batch.
LENGTHS = np.where(np.arange(100) % 3, np.random.RandomState(0).randint(1, 60, size=100), 60).tolist()
LONG_TAILED = np.clip(np.random.RandomState(2).lognormal(4.2, 1.2, size=600).astype(int), 3, 1024).tolist()


class Shuffled(SequentialSampler):
    """Rows in another order in each epoch, which the epoch alone decides."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.RandomState(self.epoch).permutation(len(self)).tolist())


class Rows(torch.utils.data.Dataset):
    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, row: int) -> int:
        return row


CASES = [
    (n_rows, batch_size, k, num_processes, drop_last)
    for n_rows in (1, 2, 5, 13, 18)
    for batch_size in (1, 2, 3)
    for k in (1, 3)
    for num_processes in (1, 2, 3)
    for drop_last in (False, True)
]


def flat(parts: Iterable[Iterable[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(parts))


def arrival(sampler: Any, batch_size: int, num_processes: int, drop_last: bool) -> list[list[list[int]]]:
    """Return each process's batches without the planner."""
    batches = BatchSampler(sampler, batch_size, drop_last)
    return [list(BatchSamplerShard(batches, num_processes, index)) for index in range(num_processes)]


def arrival_windows(shares: list[list[list[int]]], k: int, n_rows: int) -> list[list[int]]:
    """Return the rows of each window without the planner, without rows that Accelerate repeats."""
    rounds = [flat(batches) for batches in zip(*shares, strict=True)]
    rows = flat(rounds)[:n_rows]
    ends = itertools.accumulate(sum(map(len, rounds[first : first + k])) for first in range(0, len(rounds), k))
    return [sorted(rows[start:end]) for start, end in itertools.pairwise([0, *ends])]


def windows_of(shares: list[list[list[int]]], k: int) -> list[list[int]]:
    """Return the rows of each window of k micro-batches on each process."""
    return [sorted(flat(flat(share[n : n + k] for share in shares))) for n in range(0, len(shares[0]), k)]


def planned(
    sampler: Any, batch_size: int, k: int, num_processes: int, drop_last: bool, lengths: Sequence[int] = LENGTHS
) -> list[PlannedBatches]:
    """Return the planned batches of each process."""
    return [
        PlannedBatches(
            sampler, lengths, batch_size=batch_size, k=k, num_processes=num_processes, process_index=index,
            drop_last=drop_last,
        )
        for index in range(num_processes)
    ]  # fmt: skip


def is_placeholder(batches: PlannedBatches, n: int) -> bool:
    return n >= len(batches) - batches.n_repeated


def real(batches: PlannedBatches) -> list[list[int]]:
    """Return the batches of an epoch, with nothing in the place of a placeholder."""
    return [[] if is_placeholder(batches, n) else batch for n, batch in enumerate(batches)]


def test_windows_keep_their_rows_and_every_process_its_number_of_micro_batches_of_limited_size() -> None:
    for n_rows, batch_size, k, num_processes, drop_last in CASES:
        sampler = Shuffled(range(n_rows))
        without = arrival(sampler, batch_size, num_processes, drop_last)
        samplers = planned(sampler, batch_size, k, num_processes, drop_last)
        shares = [real(batches) for batches in samplers]
        assert [len(share) for share in shares] == [len(share) for share in without]
        assert [len(batches) for batches in samplers] == [len(share) for share in without]
        windows = windows_of(shares, k)
        assert windows == arrival_windows(without, k, n_rows)
        assert drop_last or sorted(flat(windows)) == list(range(n_rows))
        for share in shares:
            for position, batch in enumerate(share):
                longest = max(LENGTHS[row] for row in windows[position // k])
                assert len(batch) * max((LENGTHS[row] for row in batch), default=0) <= batch_size * longest


def test_split_batches_are_planned_as_batches_of_their_parts() -> None:
    for n_rows, num_processes, drop_last in itertools.product((5, 12, 13, 24, 31), (1, 2, 3), (False, True)):
        sampler, each, k = Shuffled(range(n_rows)), 2, 2
        batches = BatchSampler(sampler, each * num_processes, drop_last)
        shards = [
            BatchSamplerShard(batches, num_processes, index, split_batches=True) for index in range(num_processes)
        ]
        windows = arrival_windows(list(map(list, shards)), k, n_rows)
        loaders = [DataLoaderShard(Rows(n_rows), batch_sampler=shard) for shard in shards]
        samplers = [plan_batches(loader, LENGTHS, k) for loader in loaders]
        shares = [real(batches) for batches in samplers if batches is not None]
        assert [len(share) for share in shares] == [len(shard) for shard in shards]
        assert windows_of(shares, k) == windows


def test_only_the_last_batch_of_the_last_processes_is_a_placeholder_of_a_row_of_its_window() -> None:
    n_placeholders = 0
    for n_rows, batch_size, k, num_processes, drop_last in CASES:
        samplers = planned(Shuffled(range(n_rows)), batch_size, k, num_processes, drop_last)
        shares = [list(batches) for batches in samplers]
        for batches, share in zip(samplers, shares, strict=True):
            assert all(share), "a batch without rows"
            marks = [is_placeholder(batches, n) for n in range(len(share))]
            assert not any(marks[:-1])
            if any(marks):
                window = range((len(share) - 1) // k * k, len(share))
                others = [row for b, s in zip(samplers, shares, strict=True) for n in window
                          if not is_placeholder(b, n) for row in s[n]]  # fmt: skip
                assert len(share[-1]) == 1
                assert LENGTHS[share[-1][0]] == min(LENGTHS[row] for row in others)
                n_placeholders += 1
        marks = [is_placeholder(batches, len(batches) - 1) for batches in samplers]
        assert marks == sorted(marks)
    assert n_placeholders > 10


def cost(lengths: Sequence[int], costs: CostModel, packed: bool) -> float:
    tokens, width = (sum(lengths), sum(lengths)) if packed else (len(lengths) * max(lengths), max(lengths))
    return costs.of(tokens, width)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("costs", [CostModel(0, 1, 0), CostModel(20, 1, 0.01)])
@pytest.mark.parametrize("limits", [BatchLimits(None), BatchLimits(None, 25), BatchLimits(4, 60)])
def test_no_cut_into_the_same_number_of_micro_batches_costs_less(
    limits: BatchLimits, costs: CostModel, packed: bool
) -> None:
    lengths = sorted([9, 3, 14, 2, 2, 7, 30, 5, 6], reverse=True)
    n_found = 0
    for n in range(1, len(lengths) + 1):
        best = float("inf")
        for inner in itertools.combinations(range(1, len(lengths)), n - 1):
            runs = [lengths[a:b] for a, b in itertools.pairwise([0, *inner, len(lengths)])]
            sizes = [sum(run) if packed else len(run) * run[0] for run in runs]
            if all(len(run) == 1 or (len(run) <= (limits.rows or 99) and size <= (limits.tokens or 999))
                   for run, size in zip(runs, sizes, strict=True)):  # fmt: skip
                best = min(best, sum(cost(run, costs, packed) for run in runs))
        for processes in (p for p in (1, 2, 3) if n % p == 0):
            planner = MicroBatchPlanner(limits, costs, processes, packed, n_passes=n // processes)
            if best == float("inf"):
                with pytest.raises(ValueError, match=f"9 rows do not fit into {n} micro-batches"):
                    planner.split(tuple(range(9)), lengths)
                continue
            shares = planner.split(tuple(range(9)), lengths)
            assert [len(share) for share in shares] == [n // processes] * processes
            found = [[lengths[row] for row in piece.rows] for share in shares for piece in share]
            assert sum(cost(run, costs, packed) for run in found) == pytest.approx(best)
            n_found += 1
    assert n_found > 5


def test_a_window_with_fewer_rows_than_micro_batches_is_filled_up_with_dummies() -> None:
    shares = MicroBatchPlanner(BatchLimits(None), num_processes=2, n_passes=3).split((7, 8, 9), [5, 6, 4])
    assert [[piece.rows for piece in share] for share in shares] == [[(8,), (), ()], [(7,), (9,), ()]]


def padded(batches: Iterable[Sequence[int]]) -> list[int]:
    return [len(batch) * max(LONG_TAILED[row] for row in batch) for batch in batches]


def test_micro_batches_of_a_round_are_of_similar_size_and_loads_are_even() -> None:
    samplers = planned(Shuffled(range(256)), 4, 8, 8, False, LONG_TAILED)
    sizes = np.array([padded(batches) for batches in samplers])
    loads = sizes.sum(axis=1)
    assert loads.max() < 1.05 * loads.min()
    assert (sizes.min(axis=0)[:-1] >= sizes.max(axis=0)[1:]).all(), "a round with sizes of another"


def test_padding_falls_by_half_where_a_few_rows_are_long() -> None:
    without = arrival(Shuffled(range(600)), 8, 1, False)[0]
    (batches,) = planned(Shuffled(range(600)), 8, 4, 1, False, LONG_TAILED)
    assert sum(padded(batches)) < 0.5 * sum(padded(without))


def test_large_windows_are_cut_in_parts_of_whole_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftaccum.bridges.trainer.planned_batches._MOST_ROWS", 8)
    n_placeholders = 0
    for n_rows in (45, 47, 48):  # parts of two rounds
        sampler = Shuffled(range(n_rows))
        samplers = planned(sampler, 2, 6, 2, False)
        shares = [real(batches) for batches in samplers]
        assert windows_of(shares, 2) == arrival_windows(arrival(sampler, 2, 2, False), 2, n_rows)
        n_placeholders += sum(is_placeholder(batches, 11) for batches in samplers)
    assert not n_placeholders, "a part has enough rows for both processes"
    five_rounds = Shuffled(range(20))  # in parts of one, two and two rounds
    first = [[share[:1] for share in shares] for shares in (
        [real(batches) for batches in planned(five_rounds, 2, 5, 2, False)], arrival(five_rounds, 2, 2, False)
    )]  # fmt: skip
    assert windows_of(first[0], 1) == windows_of(first[1], 1)


def test_rows_without_tokens_are_planned_like_rows_of_one_token() -> None:
    batches = PlannedBatches(SequentialSampler(range(5)), [0] * 5, batch_size=2, k=3)
    assert sorted(flat(batches)) == [0, 1, 2, 3, 4]
    assert sorted(map(len, batches)) == [1, 2, 2]


@pytest.mark.parametrize("kind", [RandomSampler, SeedableRandomSampler, SequentialSampler, LengthGroupedSampler])
def test_each_epoch_has_the_order_that_the_sampler_gives_without_the_planner(kind: Any) -> None:
    def sampler() -> Any:
        if kind is LengthGroupedSampler:
            return LengthGroupedSampler(6, lengths=LENGTHS[:31], generator=torch.Generator().manual_seed(3))
        data: Any = range(31)
        return kind(data) if kind is SequentialSampler else kind(data, generator=torch.Generator().manual_seed(3))

    for drop_last in (False, True):
        batches = BatchSampler(sampler(), 3, drop_last)
        (ours,) = planned(sampler(), 3, 2, 1, drop_last)
        epochs = []
        for _ in range(3):
            windows = arrival_windows([list(batches)], 2, 31)
            found = list(ours)
            epochs.append(found)
            assert windows_of([found], 2) == windows
        assert (epochs[0] == epochs[1]) == (kind is SequentialSampler)


def loader_of(n_rows: int, process_index: int, sampler: Any = None, **options: Any) -> DataLoader:
    batches = BatchSampler(sampler or Shuffled(range(n_rows)), 2, drop_last=False)
    loader: Any = DataLoaderShard(Rows(n_rows), batch_sampler=BatchSamplerShard(batches, 2, process_index), **options)
    return loader


def test_a_loader_of_accelerate_reads_planned_batches_and_sets_the_epoch() -> None:
    for index in (0, 1):
        loader: Any = loader_of(19, index)
        n_batches = len(loader)
        batches = plan_batches(loader, LENGTHS, 3)
        assert batches is not None
        assert (loader.batch_sampler, len(loader)) == (batches, n_batches)
        for epoch in (4, 5):
            loader.set_epoch(epoch)
            read = [batch.tolist() for batch in loader]
            expected = Shuffled(range(19))
            expected.set_epoch(epoch)
            assert read == list(planned(expected, 2, 3, 2, False)[index])
            assert loader.remainder == -1, "Accelerate would truncate what it gathers"
        batches.set_epoch(4)  # as Trainer does
        assert list(batches) != read


def test_skipped_batches_do_not_change_those_that_follow() -> None:
    loader: Any = loader_of(19, 1)
    batches = plan_batches(loader, LENGTHS, 3)
    assert batches is not None
    loader.set_epoch(7)
    whole = [batch.tolist() for batch in loader]
    for n in range(1, 5):
        other: Any = loader_of(19, 1)
        plan_batches(other, LENGTHS, 3)
        rest = skip_first_batches(other, n)
        rest.set_epoch(7)
        assert [batch.tolist() for batch in rest] == whole[n:]
        assert len(rest) == len(whole) - n


@pytest.mark.slow  # starts a process
def test_data_workers_read_the_same_batches() -> None:
    loader: Any = loader_of(19, 1, num_workers=1, prefetch_factor=3)
    plan_batches(loader, LENGTHS, 3)
    assert [batch.tolist() for batch in loader] == list(planned(Shuffled(range(19)), 2, 3, 2, False)[1])


def test_a_plain_loader_of_one_process_is_planned() -> None:
    loader: Any = DataLoader(Rows(19), sampler=Shuffled(range(19)), batch_size=2)
    assert plan_batches(loader, LENGTHS, 3) is not None
    assert [batch.tolist() for batch in loader] == list(planned(Shuffled(range(19)), 2, 3, 1, False)[0])


def test_a_loader_that_cannot_be_planned_stays_as_it_is_and_the_main_process_says_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def uneven(index: int) -> Any:
        batches = BatchSampler(Shuffled(range(9)), 2, drop_last=False)
        return DataLoaderShard(Rows(9), batch_sampler=BatchSamplerShard(batches, 2, index, even_batches=False))

    own: Any = DataLoader(Rows(9), batch_sampler=[[0, 1], [2]])
    dispatched: Any = DataLoaderDispatcher(Rows(9), batch_sampler=BatchSampler(Shuffled(range(9)), 2, drop_last=False))
    cases: list[tuple[Any, Any, str]] = [
        (loader_of(9, 0), None, "it is unknown how long the rows are in a batch"),
        (own, LENGTHS, "the loader has a batch sampler of its own, list"),
        (uneven(0), LENGTHS, "`even_batches=False` gives processes different numbers of batches"),
        (dispatched, LENGTHS, "`dispatch_batches=True` cuts equal parts"),
    ]
    for loader, lengths, reason in cases:
        before = loader.batch_sampler
        assert plan_batches(loader, lengths, 2) is None
        (message,) = capsys.readouterr().err.splitlines()
        assert message.startswith(f"`planner=True` has no effect: {reason}")
        assert loader.batch_sampler is before
    assert plan_batches(uneven(1), LENGTHS, 2) is None
    assert not capsys.readouterr().err


def test_lengths_come_from_a_column_or_from_the_rows() -> None:
    rows = [{"input_ids": [5] * n} for n in (3, 1, 2)]
    assert list(row_lengths(rows) or ()) == [3, 1, 2]
    table = Dataset.from_list(rows)
    assert list(row_lengths(table) or ()) == [3, 1, 2]
    lengths = row_lengths(table.add_column("n_tokens", [30, 10, 20]), column="n_tokens")
    assert lengths is not None
    assert list(lengths) == [30, 10, 20]


def test_lengths_of_rows_that_would_have_to_be_computed_are_unknown() -> None:
    assert row_lengths(Rows(3)) is None
    assert row_lengths([{"text": "one row"}, {"text": "another one"}]) is None
    assert row_lengths(Dataset.from_list([{"input_ids": [1]}]).to_iterable_dataset()) is None
