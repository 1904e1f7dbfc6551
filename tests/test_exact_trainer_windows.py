"""`exact(Trainer)`: windows that are planned, streamed, audited, or padded to one width."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import Trainer

import trainers
from ftaccum import DataError, InexactLossError, InexactLossWarning, exact
from heads import HEADS, IGNORED, RecordingOptimizer, Row, one_batch, one_batch_gradient, relative_error
from trained_windows import ReadRows, read_window_errors

CLASSIFIER, TOKENS = HEADS["sequence classification, BERT"], HEADS["token classification, BERT"]
Planned = exact(planner=True)(Trainer)
NEAR, LOGGED, FAR = 1e-10, 1e-6, 0.1


@pytest.fixture
def _lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give rows as lists, of which the lengths are known."""
    monkeypatch.setattr(trainers, "Listed", list)


# ---- Planned windows -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_lists")
@pytest.mark.parametrize("strategy", ["random", pytest.param("group_by_length", marks=pytest.mark.slow)])
def test_planned_windows_are_exact_and_have_the_same_rows(strategy: str) -> None:
    rows, given = TOKENS.rows(23), {"train_sampling_strategy": strategy, "num_train_epochs": 2}
    gradient, loss, planned = read_window_errors(Planned, TOKENS.model(), rows, k=3, **given)
    _, _, arrived = read_window_errors(exact(Trainer), TOKENS.model(), rows, k=3, **given)
    assert planned == arrived
    assert max(gradient) < NEAR
    assert max(loss) < LOGGED


@pytest.mark.slow
@pytest.mark.usefixtures("_lists")
def test_planned_windows_have_less_padding() -> None:
    rows = CLASSIFIER.rows(64)

    def positions(trainer_class: Any) -> int:
        read = ReadRows(rows)
        trainers.gradients(
            trainer_class, CLASSIFIER.model(), rows, collate=read, parts={"callbacks": [read]},
            per_device_train_batch_size=4, gradient_accumulation_steps=4,
        )  # fmt: skip
        return sum(len(batch) * max(len(rows[n]["input_ids"]) for n in batch) for batch in read.batches)

    assert positions(Planned) < 0.9 * positions(exact(Trainer))


@pytest.mark.usefixtures("_lists")
def test_windows_are_not_planned_if_every_batch_has_one_width(capsys: pytest.CaptureFixture[str]) -> None:
    """Micro-batches of many short rows would need more memory."""

    def at_twelve(rows: list[Row]) -> Any:
        batch = one_batch(rows)
        wider = 12 - batch["input_ids"].shape[1]
        return {n: torch.nn.functional.pad(v, (0, wider)) if v.ndim == 2 else v for n, v in batch.items()}

    rows = CLASSIFIER.rows(8)
    read = ReadRows(rows, at_twelve)
    trainers.gradients(Planned, CLASSIFIER.model(), rows, collate=read, parts={"callbacks": [read]})
    assert {len(batch) for batch in read.batches} == {2}
    assert "`planner=True` has no effect" in capsys.readouterr().err


# ---- Streams and widths ----------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)


@pytest.mark.parametrize("n_rows", [5, 9, 12], ids=lambda n: f"{n} rows")
def test_windows_of_a_stream_are_exact_and_end_with_it(n_rows: int) -> None:
    rows = CLASSIFIER.rows(n_rows)
    found, _ = trainers.gradients(exact(Trainer), CLASSIFIER.model(), Stream(rows), max_steps=4)
    windows = ([rows[n : n + 4] for n in range(0, n_rows, 4)] * 4)[:4]
    wanted = [one_batch_gradient(CLASSIFIER.model(), window) for window in windows]
    assert max(relative_error(f, w) for f, w in zip(found, wanted, strict=True)) < NEAR


def test_a_stream_that_can_be_read_only_once_loses_no_rows_to_the_measurement() -> None:
    rows = CLASSIFIER.rows(8)
    stream = Stream(rows)
    once = iter(rows)
    stream.__class__ = type("Once", (Stream,), {"__iter__": lambda _: once})
    found, _ = trainers.gradients(exact(Trainer), CLASSIFIER.model(), stream, max_steps=2)
    wanted = [one_batch_gradient(CLASSIFIER.model(), rows[n : n + 4]) for n in (0, 4)]
    assert max(relative_error(f, w) for f, w in zip(found, wanted, strict=True)) < NEAR


def test_a_stream_whose_first_window_has_no_labels_is_refused() -> None:
    rows = [{**row, "labels": [IGNORED] * len(row["labels"])} for row in TOKENS.rows(4)]
    with pytest.raises(DataError, match="No row of the first window of `train_dataset` has a label that counts"):
        trainers.gradients(exact(Trainer), TOKENS.model(), Stream(rows), max_steps=1)


@pytest.mark.parametrize("name", ["question answering, BERT"])
def test_windows_have_one_width_if_padding_changes_the_loss(name: str) -> None:
    head = HEADS[name]
    gradient, loss = trainers.window_errors(exact(Trainer), head.model(), head.rows(11), size=4)
    assert max(gradient) < NEAR
    assert max(loss) < LOGGED


# ---- Audits ----------------------------------------------------------------------------------------------------------


def audited(rows: Any, *, folder: Path, **options: Any) -> Any:
    model = CLASSIFIER.model()
    optimizer = RecordingOptimizer(model)
    trainer = exact(**options)(Trainer)(
        model=model,
        args=trainers.arguments(str(folder)),
        train_dataset=rows,
        data_collator=one_batch,
        optimizers=(optimizer, LambdaLR(optimizer, lambda _: 1.0)),
    )
    with warnings.catch_warnings(record=True) as issued:
        warnings.simplefilter("always")
        trainer.train()
    return trainer, [str(each.message) for each in issued if issubclass(each.category, InexactLossWarning)]


def test_audits_compare_updates_of_a_trainer_with_one_batch(tmp_path: Path) -> None:
    trainer, said = audited(CLASSIFIER.rows(9), folder=tmp_path, audit=1)
    assert [(audit["audit"], audit["rows"], audit["reference"]) for audit in trainer.exact_audits] == [
        (1, 4, "one batch"), (2, 4, "one batch"), (3, 1, "one batch"),
    ]  # fmt: skip
    assert max(audit["error"] for audit in trainer.exact_audits) < NEAR
    assert said == []


def test_an_audit_finds_items_that_the_user_counts_wrongly(tmp_path: Path) -> None:
    def wrong(batch: Any) -> int:
        return int(batch["attention_mask"].sum()) ** 2  # tokens instead of rows

    trainer, said = audited(CLASSIFIER.rows(9), folder=tmp_path, audit=1, count_items=wrong)
    assert max(audit["error"] for audit in trainer.exact_audits) > FAR
    assert said
    with pytest.raises(InexactLossError):
        audited(CLASSIFIER.rows(9), folder=tmp_path, audit=1, count_items=wrong, on_inexact="error")


def test_audits_leave_the_run_as_it_is(tmp_path: Path) -> None:
    rows = Dataset.from_list(CLASSIFIER.rows(9))
    (one, _), (other, _) = (audited(rows, folder=tmp_path, audit=audit) for audit in (1, False))
    assert other.exact_audits == []
    found, wanted = (each.optimizer.optimizer.gradients for each in (one, other))
    assert all(torch.equal(f[name], w[name]) for f, w in zip(found, wanted, strict=True) for name in w)
