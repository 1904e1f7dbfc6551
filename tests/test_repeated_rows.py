"""Rows that Accelerate would repeat at the end of an epoch: left out, logged, or refused."""

import inspect
import itertools
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import data_loader
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard, IterableDatasetShard
from accelerate.state import GradientState
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler
from transformers import trainer_pt_utils
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from ftaccum import SettingsError
from ftaccum.bridges.loader_repeats import without_fill
from ftaccum.bridges.trainer.repeated_rows import DistinctBatches, RepeatedRows
from ftaccum.bridges.trainer.shared_order import share_order

ROWS: Any = range(40)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(9))


def processes(n: int) -> list[Any]:
    """Return accelerators of n processes, as far as they are used."""
    state: Any = GradientState()
    return [SimpleNamespace(num_processes=n, process_index=index, gradient_state=state) for index in range(n)]


def real_batches(batch_sampler: Any, n_processes: int, **options: Any) -> list[list[list[int]]]:
    """Return the batches of each process, with an empty list in the place of one whose rows are repeated."""
    found = []
    for accelerator in processes(n_processes):
        shard = BatchSamplerShard(batch_sampler, n_processes, accelerator.process_index, **options)
        loader: Any = DataLoaderShard(ROWS, batch_sampler=shard, collate_fn=list)
        repeated = RepeatedRows(loader, accelerator)
        assert type(shard) is DistinctBatches
        batches = list(repeated.watch(iter(loader)))
        assert all(batches)
        found.append([batch or [] for batch in repeated.leave_out(batches)])
    return found


def flat(parts: Iterable[Iterable[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(parts))


# ---- Batch samplers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split_batches", [False, True])
def test_batches_are_those_of_accelerate_without_repeated_rows(split_batches: bool) -> None:
    for n_rows, n_processes, drop_last in itertools.product(range(1, 20), (2, 3), (False, True)):
        size = 2 * n_processes if split_batches else 2
        batches = BatchSampler(SequentialSampler(range(n_rows)), size, drop_last)
        found = real_batches(batches, n_processes, split_batches=split_batches)
        theirs = [
            list(BatchSamplerShard(batches, n_processes, index, split_batches=split_batches))
            for index in range(n_processes)
        ]
        assert [len(share) for share in found] == [len(share) for share in theirs]
        rounds = [flat(shares) for shares in zip(*found, strict=True)]
        unrepeated = iter(flat(flat(shares) for shares in zip(*theirs, strict=True)))
        assert rounds == [list(itertools.islice(unrepeated, len(rows))) for rows in rounds]
        if not drop_last:
            assert flat(rounds) == list(range(n_rows))


class OwnBatches:
    """Batches of unequal sizes, with neither `sampler` nor `batch_size` nor a length."""

    def __init__(self, n: int) -> None:
        self._n = n

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1, 2], [3], [4, 5], [6], [7, 8]][: self._n])


@pytest.mark.parametrize("n_batches", range(1, 6))
def test_rows_of_a_batch_sampler_that_the_user_wrote_come_once(n_batches: int) -> None:
    for n_processes in (2, 3):
        found = real_batches(OwnBatches(n_batches), n_processes)
        assert len({len(share) for share in found}) == 1
        assert sorted(flat(flat(found))) == flat(OwnBatches(n_batches))


def test_rows_come_once_in_every_epoch_and_after_a_skip() -> None:
    accelerator = processes(2)[1]
    shard = BatchSamplerShard(BatchSampler(SequentialSampler(range(9)), 2, drop_last=False), 2, 1)
    loader: Any = DataLoaderShard(ROWS, batch_sampler=shard, collate_fn=list)
    repeated = RepeatedRows(loader, accelerator)
    for each in (loader, loader, data_loader.skip_first_batches(loader, 1)):
        batches = list(repeated.watch(iter(each)))
        assert repeated.leave_out(batches[-2:]) == [[6, 7], None]


# ---- What cannot be left out -----------------------------------------------------------------------------------------


def test_the_main_process_logs_rows_that_cannot_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    class OwnShard(BatchSamplerShard):
        pass

    def logged(loader: Any, accelerator: Any) -> str:
        RepeatedRows(loader, accelerator)
        return capsys.readouterr().err

    batches = BatchSampler(SequentialSampler(range(9)), 2, drop_last=False)
    for accelerator in processes(2):
        index = accelerator.process_index
        own = DataLoader(ROWS, batch_sampler=OwnShard(batches, 2, index))
        torchs = DataLoader(ROWS, sampler=DistributedSampler(range(9), 2, index))  # type: ignore[arg-type, var-annotated]
        even = DataLoader(ROWS, sampler=DistributedSampler(range(8), 2, index))  # type: ignore[arg-type, var-annotated]
        for loader, name in ((own, "OwnShard"), (torchs, "DistributedSampler")):
            assert (f"Rows that {name} repeats" in logged(loader, accelerator)) == (index == 0)
        assert logged(even, accelerator) == ""


def test_a_stream_of_which_each_process_reads_its_own_rows_is_refused() -> None:
    one, *_ = processes(1)
    for accelerator in processes(2):
        shard = IterableDatasetShard(Stream(), 2, False, 2, accelerator.process_index)  # type: ignore[arg-type]
        own: Any = Stream()  # as the parts that the `datasets` library deals
        for rows in (shard, own):
            with pytest.raises(SettingsError, match=r"`accelerator_config\.dispatch_batches` is False"):
                RepeatedRows(DataLoaderShard(rows, batch_size=2), accelerator)
            RepeatedRows(DataLoaderShard(rows, batch_size=2), one)
        RepeatedRows(DataLoaderDispatcher(own, batch_size=2), accelerator)
        shard.drop_last = True
        RepeatedRows(DataLoaderShard(shard, batch_size=2), accelerator)


@pytest.mark.parametrize(("n_dealt", "wanted"), [(3, (2, 1)), (4, (2, 2)), (1, (1, None)), (2, (2, None))])
def test_rows_that_complete_a_dealt_batch_are_left_out(n_dealt: int, wanted: tuple[int | None, int | None]) -> None:
    part = {"labels": torch.arange(2)}
    found = [without_fill(part, n_dealt, index) for index in (0, 1)]
    assert tuple(rows and len(rows["labels"]) for rows in found) == wanted


# ---- One order for all processes -------------------------------------------------------------------------------------


def grouped_order(seed: int, epoch: int, *, is_sharded: bool = True, draws: int = 0) -> list[int]:
    sampler = LengthGroupedSampler(2, lengths=[n % 7 + 1 for n in ROWS])
    batches = BatchSampler(sampler, 2, drop_last=False)
    loader: Any = DataLoaderShard(ROWS, batch_sampler=BatchSamplerShard(batches) if is_sharded else batches)
    share_order(loader, seed)
    torch.rand(draws)  # dropout
    loader.set_epoch(epoch)
    return list(sampler)


def test_rows_grouped_by_length_have_an_order_that_follows_from_seed_and_epoch() -> None:
    orders = {(seed, epoch): grouped_order(seed, epoch) for seed, epoch in [(0, 0), (0, 1), (7, 0)]}
    assert len(set(map(tuple, orders.values()))) == 3
    for place, order in orders.items():
        assert sorted(order) == list(ROWS)
        assert grouped_order(*place, draws=5) == order
        assert grouped_order(*place, is_sharded=False) == order


# ---- Names of other libraries that subclasses and loaders rely on ----------------------------------------------------


def test_samplers_of_accelerate_and_transformers_still_have_what_their_subclasses_use() -> None:
    batches = BatchSampler(SequentialSampler(range(9)), 2, drop_last=False)
    shared = {"num_processes", "process_index", "split_batches", "batch_size", "drop_last"}
    assert {"batch_sampler", "even_batches", *shared} <= vars(BatchSamplerShard(batches, 2, 1)).keys()
    assert {"dataset", *shared} <= vars(IterableDatasetShard(Stream(), 2)).keys()  # type: ignore[arg-type]
    assert "generator" in vars(LengthGroupedSampler(2, lengths=[1, 2]))
    balanced = BatchRebalanceSampler([1] * 5, 4, 2, 2, drop_last=False)
    used = {"has_tail", "num_full_batches", "num_global_batches", "remainder", "grad_accum", "dp_size", "rank"}
    assert used <= vars(balanced).keys()
    assert (balanced.has_tail, balanced.remainder, balanced.num_global_batches) == (True, 1, 2)
    for overridden in (BatchRebalanceSampler._yield_global_batch, BatchRebalanceSampler._assign):
        assert inspect.isfunction(overridden)
    assert list(inspect.signature(BatchRebalanceSampler._yield_global_batch).parameters) == ["self", "batch_indices"]
    assert "has_tail" in inspect.getsource(trainer_pt_utils.BatchRebalanceSampler.__iter__)
    assert "self.epoch" in inspect.getsource(IterableDatasetShard.__iter__)


def test_a_dispatcher_still_tells_how_many_rows_it_read_last() -> None:
    loader: Any = DataLoaderDispatcher(ROWS, batch_size=3)
    remainders = [loader.remainder for _ in loader if loader.end_of_dataloader]
    assert remainders == [1]
    assert loader.state.process_index == 0
    assert "self.remainder = observed_batch_size" in inspect.getsource(DataLoaderDispatcher.__iter__)
