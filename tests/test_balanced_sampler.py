"""`sampler="balanced"`: draws from each class with equal probability, which depend only on the seed and the epoch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from ftaccum import CheckpointError, DataError, SettingsError, test_fine_tuning
from ftaccum.apps.search.settings import reserved
from ftaccum.arguments import parse_settings
from ftaccum.data.classes import row_classes
from ftaccum.data.convert import as_rows
from ftaccum.planning.base_plan import Progress
from ftaccum.planning.batch_size import BatchSizes
from ftaccum.planning.plan import Plan
from ftaccum.planning.shuffle import balanced_order_of
from heads import HEADS, RecordingOptimizer, one_batch_gradient, relative_error
from interrupted import CutOff, fine_tuned

BERT = HEADS["sequence classification, BERT"]
UNEQUAL = (0, 0, 0, 0, 0, 0, 0, 1, 1, -1, 0, 0, 2)  # position 9 has no class


def plan_of(size: int, **more: Any) -> Plan:
    return Plan(len(UNEQUAL), 3, BatchSizes(2, size // 2, 1, size), classes=UNEQUAL, **more)


def rows_of(plan: Plan) -> list[tuple[int, ...]]:
    return [window.rows for epoch in plan.epochs for window in plan.windows(epoch)]


def test_each_class_is_drawn_equally_often_and_so_is_each_of_its_rows() -> None:
    draws = np.concatenate([balanced_order_of(epoch, UNEQUAL, 1) for epoch in range(2000)])
    assert len(draws) == 2000 * len(UNEQUAL)
    found = np.bincount(draws, minlength=len(UNEQUAL)) / len(draws)
    wanted = [0.0 if c == -1 else 1 / 3 / UNEQUAL.count(c) for c in UNEQUAL]
    assert np.abs(found - wanted).max() < 0.01
    assert found[9] == 0


def test_draws_depend_on_the_seed_and_the_epoch_alone() -> None:
    """A run resumes from its seed: other numbers would repeat and leave out rows."""
    assert balanced_order_of(0, (0, 0, 1, 0, 2, -1), 42) == [3, 4, 4, 2, 0, 4]
    assert balanced_order_of(1, UNEQUAL, 1) == balanced_order_of(1, UNEQUAL, 1)
    assert balanced_order_of(1, UNEQUAL, 1) != balanced_order_of(2, UNEQUAL, 1) != balanced_order_of(2, UNEQUAL, 2)


@pytest.mark.parametrize("remainder", ["flush", "carry"])
def test_windows_are_the_draws_of_the_epochs_in_turn(remainder: str) -> None:
    draws = [row for epoch in range(3) for row in balanced_order_of(epoch, UNEQUAL, 42)]
    windows = rows_of(plan_of(4, remainder=remainder))
    assert [row for rows in windows for row in rows] == draws
    assert [len(rows) for rows in windows] == ([4, 4, 4, 1] * 3 if remainder == "flush" else [4] * 9 + [3])
    late = plan_of(4, remainder=remainder).windows(1, start=5)
    assert next(late).rows == windows[5]


def test_a_run_resumes_in_other_sizes_after_the_same_draws() -> None:
    draws = [row for rows in rows_of(plan_of(4)) for row in rows]
    plan, epoch = plan_of(6).resume_after(Progress([4, 4], last_epoch=0, n_rows=len(UNEQUAL), max_updates=None))
    assert epoch == 0
    assert [row for window in plan.windows(0, start=2) for row in window.rows] == draws[8 : len(UNEQUAL)]


def labelled(labels: Sequence[Any], name: str = "labels") -> list[dict[str, Any]]:
    return [{"input_ids": [n + 5, 7], name: label} for n, label in enumerate(labels)]


class Computed:
    """Rows that are computed when they are fetched."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (labelled([2, 0, 2, -100]), (0, 1, 0, -1)),
        (Dataset.from_list(labelled([2, 0, 2, -100], "label")), (0, 1, 0, -1)),
        (Dataset.from_list(labelled(["b", "a", "b"])), (0, 1, 0)),
        (labelled([True, False, np.bool_(True)]), (0, 1, 0)),
        (labelled([torch.tensor(4), np.int64(4), 3]), (0, 0, 1)),
        (Computed(labelled([1, 5, 1], "label_ids")), (0, 1, 0)),
        ([(torch.ones(2), torch.tensor(n)) for n in (3, 3, 1)], (0, 0, 1)),
        (Computed([(torch.ones(2), n) for n in (3, 1)] * 200), (0, 1) * 200),
    ],
)
def test_the_class_of_a_row_is_its_label(data: Any, wanted: tuple[int, ...]) -> None:
    assert row_classes(as_rows(data, "train_data"), -100) == wanted


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (labelled([1, 0, [0, 1]]), r"row 2 of `train_data` has the label \[0, 1\]"),
        (labelled([0.5, 1.0]), "row 0 of `train_data` has the label 0.5"),
        (Dataset.from_list(labelled([[0, 1], [1]])), r"row 0 of `train_data` has the label \[0, 1\]"),
        ([{"input_ids": [5]}, {"input_ids": [6]}], "row 0 of `train_data` has no label"),
        (labelled([1, None, 0]), "row 1 of `train_data` has no label"),
    ],
)
def test_rows_without_a_single_label_are_refused(data: Any, words: str) -> None:
    with pytest.raises(DataError, match=f"`sampler` is 'balanced', which draws rows by their class, but {words}"):
        row_classes(as_rows(data, "train_data"), -100)


def test_labels_of_tokens_and_streams_are_refused_before_training() -> None:
    tags = HEADS["token classification, BERT"]
    with pytest.raises(DataError, match=r"but row 0 of `train_data` has the label \["):
        test_fine_tuning(tags.model(), train_data=tags.rows(), sampler="balanced", validation_split=0.0, progress=False)
    stream = IterableDataset.from_generator(lambda: iter(BERT.rows()))
    with pytest.raises(SettingsError, match="a stream, whose classes are unknown, but `sampler` is 'balanced'"):
        test_fine_tuning(BERT.model(), train_data=stream, sampler="balanced", max_updates=1, validation_split=0.0)


def test_balancing_twice_is_refused_and_a_search_does_not_vary_it() -> None:
    with pytest.raises(SettingsError, match="`class_weights` and `sampler` are both 'balanced'"):
        parse_settings({"class_weights": "balanced", "sampler": "balanced"})
    assert parse_settings({"class_weights": [1, 2], "sampler": "balanced"})[0].sampler == "balanced"
    with pytest.raises(SettingsError, match="`sampler` must be 'shuffle' or 'balanced', but is 'even' instead"):
        parse_settings({"sampler": "even"})
    assert "same rows" in str(reserved("sampler"))


def test_each_window_is_one_batch_of_its_draws(capsys: pytest.CaptureFixture[str]) -> None:
    rows, labels = BERT.rows(len(UNEQUAL)), [-100 if c == -1 else c for c in UNEQUAL]
    rows = [{**row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    model = BERT.model()
    windows = rows_of(plan_of(6))[:6]
    assert any(len(set(window)) < len(window) for window in windows)  # some draw a row twice
    wanted: list[dict[str, Tensor]] = [one_batch_gradient(model, [rows[n] for n in window]) for window in windows]
    optimizer = RecordingOptimizer(model)
    test_fine_tuning(
        model, train_data=rows, sampler="balanced", optimizer=optimizer, n_epochs=2, batch_size=2, progress=False,
        effective_batch_size=6, validation_split=0.0, gradient_clip_norm=None, on_inexact="error",
    )  # fmt: skip
    assert len(optimizer.gradients) == 6
    assert max(relative_error(f, w) for f, w in zip(optimizer.gradients, wanted, strict=True)) < 1e-12
    assert (
        "Sampler: 13 draws per epoch, evenly from 3 classes (9, 2, 1 rows), with replacement" in capsys.readouterr().out
    )


def test_a_run_that_is_cut_off_resumes_to_the_last_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments: dict[str, Any] = {"sampler": "balanced", "remainder": "carry", "max_updates": 5, "audit": False}
    arguments |= {"train_data": BERT.rows(20), "effective_batch_size": 8, "checkpoint_every": 1}
    whole = fine_tuned(output_dir=str(tmp_path / "whole"), **arguments)
    with pytest.raises(CutOff):
        fine_tuned(cut_off_at=3, output_dir=str(tmp_path / "cut"), **arguments)
    with pytest.raises(CheckpointError, match="`sampler` was 'balanced', but is 'shuffle' now"):
        fine_tuned(output_dir=str(tmp_path / "cut"), resume="auto", **arguments | {"sampler": "shuffle"})
    again = fine_tuned(output_dir=str(tmp_path / "cut"), resume="auto", **arguments)
    assert whole.differences(again) == []
    assert "24 rows are done, and no draw is skipped or repeated." in capsys.readouterr().err
