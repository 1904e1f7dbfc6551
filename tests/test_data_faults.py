"""Unreadable rows, workers that die, and random rows: training gives the same result or keeps its updates."""

import json
import multiprocessing
import os
import queue
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import datasets
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from failing_data import (
    BEFORE_17,
    N_ROWS,
    WINDOW,
    Deadly,
    Noisy,
    NoisyByItself,
    Pairs,
    Raising,
    SeldomNoisy,
    pair,
    same_bits,
    trained,
    updates_in,
)
from ftaccum import DataError
from ftaccum.data import workers
from ftaccum.data.collator import RowCollator
from ftaccum.data.columns import ColumnRules
from ftaccum.data.convert import as_rows
from ftaccum.data.dataset import Rows
from ftaccum.data.loader import Loader
from ftaccum.data.padding import PaddingCollator
from ftaccum.data.prefetch import WindowLoader
from ftaccum.data.value_ranges import ValueRanges
from ftaccum.data.workers import Workers, how_it_ended
from ftaccum.planning.batch_size import BatchSizes
from ftaccum.planning.micro_batches import BatchLimits, MicroBatchPlanner
from ftaccum.planning.plan import Plan
from ftaccum.runtime.state_guards import Generators
from heads import relative_error


def with_transform() -> datasets.Dataset:
    def raising(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if 17 in batch["number"]:
            raise OSError("disk on fire")
        pairs = [pair(number) for number in batch["number"]]
        return {"input": [x for x, _ in pairs], "labels": [y for _, y in pairs]}

    return datasets.Dataset.from_dict({"number": list(range(N_ROWS))}).with_transform(raising)


class OfDicts(Raising):
    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return {"input": x, "labels": y}


def collated(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if any(torch.equal(x, pair(17)[0]) for x, _ in rows):
        raise OSError("disk on fire")
    return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])


class Listed(list[Any]):
    def __getitem__(self, index: Any) -> Any:
        return Raising()[index]


class OnDicts(nn.MSELoss):
    def forward(self, outputs: Tensor, batch: Any) -> Tensor:
        return super().forward(outputs, batch["labels"])


FORMS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "pairs": (Raising, {}),
    "dicts": (OfDicts, {"loss_fn": OnDicts()}),
    "a list": (lambda: Listed(range(N_ROWS)), {}),
    "a transform": (with_transform, {"loss_fn": OnDicts()}),
    "a collator": (Pairs, {"data_collator": collated}),
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("form", FORMS)
def test_an_unreadable_row_is_named_by_its_index_in_the_users_data(form: str, num_workers: int) -> None:
    data, arguments = FORMS[form]
    for share in (0.0, 0.2, 0.9):  # with 0.9, row 17 is held out
        with pytest.raises(DataError, match=r"[Rr]ow 17 .*disk on fire"):
            trained(data(), validation_split=share, num_workers=num_workers, **arguments)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_updates_before_an_unreadable_row_are_in_the_ledger(num_workers: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Row 17 of `train_data` cannot be read: OSError\('disk on fire'\)"):
        trained(Raising(), num_workers=num_workers, output_dir=str(tmp_path))
    assert updates_in(tmp_path) == BEFORE_17


def test_the_odd_row_is_named_at_any_place_in_its_batch() -> None:
    class Odd(Pairs):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            x, y = pair(index)
            return (torch.cat([x, x]) if index == 17 else x), y

    rows = as_rows(Odd(), "train_data")
    row_collator = RowCollator(lambda rows: torch.stack([x for x, _ in rows]))
    for known in (False, True):  # whether a valid row is known beforehand
        for positions in ([17, 30, 31], [30, 31, 17], [17, 30], [30, 17])[: 4 if known else 2]:
            with pytest.raises(DataError, match="In `train_data`, row 17 cannot be batched"):
                row_collator(rows, positions)
        row_collator.find_draws(rows)


@pytest.mark.parametrize(("wrong", "kind"), [(None, "NoneType"), ((1, 2, 3), "tuple"), ([1], "list")])
def test_a_value_that_is_not_a_row_is_named_before_training(wrong: Any, kind: str) -> None:
    rows: list[Any] = [{"input": x, "labels": y} for x, y in map(pair, range(N_ROWS))]
    rows[17] = wrong
    with pytest.raises(DataError, match=f"`train_data` must be .*, but row 17 is a {kind} instead"):
        trained(rows, loss_fn=OnDicts())


def test_a_row_whose_loss_is_not_finite_is_named_before_training() -> None:
    rows = [pair(index) for index in range(4)]
    rows[2] = (rows[2][0] * float("nan"), rows[2][1])
    with pytest.raises(DataError, match=r"The loss of row 2 of `train_data` is nan before any .* in these rows\."):
        trained(rows)


def test_rows_are_fetched_one_by_one_if_a_bulk_fetch_is_incomplete() -> None:
    class Forgetful(Pairs):
        def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
            return [pair(index) for index in indices if index != 17]

    assert same_bits(trained(Forgetful())[0], trained(Pairs())[0])


def test_a_collator_that_loses_rows_is_refused_with_their_names() -> None:
    def without_17(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        kept = [(x, y) for x, y in rows if not torch.equal(x, pair(17)[0])]
        return torch.stack([x for x, _ in kept]), torch.stack([y for _, y in kept])

    with pytest.raises(
        DataError, match=r"`data_collator` turned 2 rows into a batch of 1, .* rows (17, \d+|\d+, 17) of `train_"
    ):
        trained(Pairs(), data_collator=without_17)


def test_rows_of_a_subset_keep_their_names() -> None:
    rows = Rows("train_data", Raising(), names=[100 + n for n in range(N_ROWS)])
    with pytest.raises(DataError, match="Row 117 of `train_data` cannot be read"):
        rows.subset([3, 17]).fetch([0, 1])
    assert rows.names_of(range(3)) == "rows 100, 101, 102"
    assert rows.subset(range(20, 40)).names_of(range(20)).endswith("126, 127 and 12 more")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"val_data": Pairs()}], ids=["training", "with validation"])
def test_a_killed_worker_does_not_change_the_run(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed, result = trained(Deadly(tmp_path, 0), num_workers=2, **arguments)
    assert "worker" not in capsys.readouterr().err
    weights, after_death = trained(Deadly(tmp_path, 2), num_workers=2, **arguments)
    assert same_bits(weights, undisturbed)
    assert after_death.loss_history == result.loss_history
    told = (
        "A worker process that was making a batch of `train_data` was killed by SIGKILL. New workers make the missing"
    )
    assert capsys.readouterr().err.count(told) == 2


@pytest.mark.slow
def test_a_worker_killed_in_evaluation_does_not_change_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed, result = trained(Pairs(), val_data=Deadly(tmp_path, 0), num_workers=2)
    weights, after_death = trained(Pairs(), val_data=Deadly(tmp_path, 1), num_workers=2)
    assert same_bits(weights, undisturbed)
    assert after_death.val_loss_history == result.val_loss_history
    assert "making a batch of `val_data` was killed by SIGKILL" in capsys.readouterr().err


@pytest.mark.slow
def test_finished_batches_of_a_killed_worker_are_made_again() -> None:
    """Its batches are in memory that only it could share. Every third update kills all workers."""

    class Killing(torch.optim.SGD):
        updates = 0

        def step(self, closure: Any = None) -> Any:
            Killing.updates += 1
            if Killing.updates % 3 == 0:
                time.sleep(0.1)  # until they have finished all their jobs
                for child in multiprocessing.active_children():
                    os.kill(cast(int, child.pid), signal.SIGKILL)
            return super().step(closure)

    undisturbed, _ = trained(Noisy(), num_workers=3, optimizer=torch.optim.SGD)
    weights, _ = trained(Noisy(), num_workers=3, optimizer=Killing)
    assert same_bits(weights, undisturbed)
    assert Killing.updates == 24
    assert multiprocessing.active_children() == []


def test_workers_that_die_repeatedly_end_the_run_with_a_message(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(DataError) as raised:
        trained(Deadly(tmp_path, 99), num_workers=2, output_dir=str(tmp_path / "run"))
    assert time.monotonic() - started < 20
    for words in (
        "killed by SIGKILL, and 2 others died before it",
        "was of rows",
        "17",
        "lower `num_workers`",
        "/dev/shm",
    ):
        assert words in str(raised.value)
    assert updates_in(tmp_path / "run") == BEFORE_17
    assert len(list(tmp_path.glob("life *"))) in (99 - 3, 99 - 4)  # one more if row 17 was read ahead
    assert multiprocessing.active_children() == []


def test_the_exit_code_of_a_worker_is_described() -> None:
    assert how_it_ended(-signal.SIGBUS) == "was killed by SIGBUS"
    assert how_it_ended(3) == "ended with exit code 3"


def test_a_batch_that_cannot_be_pickled_is_reported() -> None:
    def with_a_lambda(rows: list[tuple[Tensor, Tensor]]) -> Any:
        return {
            "input": torch.stack([x for x, _ in rows]),
            "labels": torch.stack([y for _, y in rows]),
            "of": lambda: 0,
        }

    with pytest.raises(DataError, match=r"A batch cannot be sent by the worker that made it: .*`num_workers=0`"):
        trained(Pairs(), data_collator=with_a_lambda, loss_fn=OnDicts(), num_workers=1)


def unlamented(_job: Any, _exit_code: int) -> None:
    raise AssertionError("no worker is to die")


def test_no_worker_is_left_if_another_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others would never be told to end, and the interpreter would wait for them."""
    start, started = multiprocessing.process.BaseProcess.start, []

    def failing(process: Any) -> None:
        if len(started) == 2:
            raise OSError("Cannot allocate memory")
        started.append(process)
        start(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", failing)
    with pytest.raises(DataError, match=r"A worker cannot be started: Cannot allocate memory.*`num_workers`"):
        Workers(lambda job: job, range(9), 3, unlamented)
    left = [process for process in started if process.is_alive()]
    for process in left:
        process.kill()  # otherwise a failing test would hang
    assert len(started) == 2
    assert not left


def test_a_worker_exits_when_its_job_pipe_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(BaseException):
        pass

    def end(_code: int) -> None:
        raise Ended

    alive, _kept = multiprocessing.Pipe(duplex=False)
    jobs, given = multiprocessing.Pipe(duplex=False)
    given.send("one")
    given.close()
    todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
    monkeypatch.setattr(workers, "parent_process", lambda: SimpleNamespace(sentinel=alive))
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended):
        workers._receive(jobs, todo)
    assert todo.get_nowait() == "one"


def test_each_worker_has_its_own_seed() -> None:
    def seed(_job: Any) -> int:
        info = get_worker_info()
        assert info is not None
        return info.seed

    making = Workers(seed, range(4), 2, unlamented)
    first, second, *again = list(making)
    making.end()
    assert (first, second) == (torch.initial_seed(), torch.initial_seed() + 1)
    assert again == [first, second]


def test_workers_ignore_the_signals_that_end_a_run(capfd: pytest.CaptureFixture[str]) -> None:
    """A terminal sends Ctrl-C, and a scheduler SIGTERM, to all processes. Only the main process must react."""

    class Interrupting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for child in multiprocessing.active_children():
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                    os.kill(cast(int, child.pid), number)
            return super().step(closure)

    trained(Pairs(), num_workers=2, optimizer=Interrupting)
    out, error = capfd.readouterr()
    assert "worker process" not in out
    assert "KeyboardInterrupt" not in error


WAYS: dict[str, dict[str, Any]] = {
    "two workers": {"num_workers": 2},
    "in one": {"batch_size": 6},
    "in ones, by a worker": {"batch_size": 1, "num_workers": 1},
    "in order": {"batch_size": 5, "planner": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Noisy, SeldomNoisy])
@pytest.mark.parametrize("way", WAYS)
def test_random_numbers_of_rows_do_not_depend_on_workers_or_batches(way: str, kind: type[Noisy]) -> None:
    plain, result = trained(kind(), val_data=kind())
    weights, other = trained(kind(), val_data=kind(), **WAYS[way])
    assert relative_error(weights, plain) < 1e-9
    assert same_bits(weights, plain) or way != "two workers"
    assert other.val_loss_history == pytest.approx(result.val_loss_history, rel=1e-9)


@pytest.mark.slow
def test_rows_draw_new_numbers_in_every_epoch_but_not_in_evaluation() -> None:
    _, result = trained(Noisy(), val_data=Noisy(), learning_rate=1e-300, weight_decay=0.0, n_epochs=3)
    assert len({result.initial_loss, *result.val_loss_history}) == 1
    assert len(set(result.train_loss_history)) == 3
    assert relative_error(trained(Noisy())[0], trained(Pairs())[0]) > 1e-2
    assert relative_error(trained(Noisy())[0], trained(Noisy(), random_seed=43)[0]) > 1e-2


@pytest.mark.slow
def test_random_numbers_of_a_collator_for_one_row_do_not_depend_on_workers() -> None:
    def noisy(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        is_17 = any(torch.equal(x, pair(17)[0]) for x, _ in rows)
        noise = random.gauss(0, 1) + torch.randn(()) if is_17 else 0
        return torch.stack([x for x, _ in rows]) + noise, torch.stack([y for _, y in rows])

    def trained_by(**arguments: Any) -> dict[str, Tensor]:
        return trained(Pairs(), data_collator=noisy, **arguments)[0]

    plain = trained_by()
    assert same_bits(trained_by(num_workers=2), plain)
    assert not same_bits(trained_by(random_seed=43), plain)
    before = Generators.now()
    batches_from(Pairs(), 0, collator=noisy)
    assert before.unchanged()


def test_a_collator_that_draws_without_effect_is_detected() -> None:
    def seldom(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        inputs, targets = (torch.stack(column) for column in zip(*rows, strict=True))
        return inputs + (random.random() < 1e-9), targets

    collations = [RowCollator(PaddingCollator(ColumnRules())), RowCollator(seldom)]
    for row_collator in collations:
        row_collator.find_draws(as_rows(Noisy(), "train_data"))
    assert [row_collator.draws for row_collator in collations] == [False, True]


def loader_of(data: Any, num_workers: int = 0, collator: Any = None) -> Loader:
    rows, row_collator = as_rows(data, "train_data"), RowCollator(collator or PaddingCollator(ColumnRules()))
    row_collator.find_draws(rows)
    objective = SimpleNamespace(padding_sensitive=False, terms=("loss",), count=lambda batch: {"loss": len(batch[0])})
    return Loader(rows, row_collator, cast(Any, objective), ValueRanges(), num_workers=num_workers)


def batches_from(data: Any, start: int, num_workers: int = 0, collator: Any = None) -> list[tuple[int, list[Tensor]]]:
    window_loader = WindowLoader(
        Plan(N_ROWS, 3, BatchSizes(2, 3, 1, WINDOW)),
        loader_of(data, num_workers, collator),
        MicroBatchPlanner(BatchLimits(2)),
    )
    local_windows = [
        local_window for epoch in window_loader.plan.epochs for local_window in window_loader.epoch(epoch, start)
    ]
    return [(p.window.index, [micro.batch[0] for micro in p.micro_batches]) for p in local_windows]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.slow
def test_a_loader_that_starts_later_gives_the_same_batches(num_workers: int) -> None:
    whole = batches_from(Noisy(), 0)
    for start in (1, 11, 12, 17, 35, 36):
        found = batches_from(Noisy(), start, num_workers)
        assert [index for index, _ in found] == list(range(start, 36))
        for (_, some), (_, wanted) in zip(found, whole[start:], strict=True):
            assert all(map(torch.equal, some, wanted))


def test_a_start_at_a_late_window_reads_no_earlier_rows() -> None:
    asked: list[int] = []

    class Counted(Pairs):
        def __len__(self) -> int:
            return 100_000

        def __getitem__(self, index: int) -> Any:
            asked.append(index)
            return super().__getitem__(index)

    window_loader = WindowLoader(
        Plan(100_000, 1, BatchSizes(2, 3, 1, WINDOW)), loader_of(Counted()), MicroBatchPlanner(BatchLimits(2))
    )
    asked.clear()
    started = time.process_time()
    local_window = next(window_loader.epoch(0, 10_000))
    assert time.process_time() - started < 0.2
    assert local_window.window.index == 10_000
    assert sorted(asked) == sorted(local_window.window.rows)


def test_rows_that_draw_are_detected_and_leave_the_generators_unchanged() -> None:
    rows = [as_rows(kind(), "train_data") for kind in (Pairs, Noisy, NoisyByItself)]
    collations = [RowCollator(PaddingCollator(ColumnRules())) for _ in rows]
    before = Generators.now()
    for each, row_collator in zip(rows, collations, strict=True):
        row_collator.find_draws(each)
        each.fetch(range(9))
    assert before.unchanged()
    assert [each.draw for each in rows] == [False, True, False]
    assert [row_collator.repeats for row_collator in collations] == [True, True, False]


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_raise_the_same_error_for_a_row_of_one_of_them(
    two_processes: Callable[..., str], tmp_path: Path
) -> None:
    alone, result = trained(Noisy(), val_data=Noisy())
    torch.save(alone, tmp_path / "alone.pt")
    printed = two_processes("data_faults_of_two.py", str(tmp_path))
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("FOUND "))[6:])
    for case in ("row", "row, with workers", "validation row", "dying workers"):
        one, other = found["errors"][case]
        assert one == other
        assert "(Process 1 raised this, so all processes stop.)" in one
    assert "Row 17 of `train_data` cannot be read: OSError('disk on fire')." in found["errors"]["row"][0]
    assert "Row 17 of `val_data` cannot be read" in found["errors"]["validation row"][0]
    assert "killed by SIGKILL, and 2 others died before it" in found["errors"]["dying workers"][0]
    assert found["ledgers"] == {"row": BEFORE_17, "row, with workers": BEFORE_17, "dying workers": BEFORE_17}
    assert found["difference"] < 1e-9
    assert found["val losses"] == pytest.approx(result.val_loss_history, rel=1e-9)
