"""The Recipe alone determines the result of a run. The Runtime may change time and memory only."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from heads import HEADS
from invariance import BALANCED, CUTS, NAMES, difference, trained
from test_growing_windows import CHANGING, cut_otherwise


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_physical_batch_changes_nothing(name: str) -> None:
    runs = {batch_size: trained(name, batch_size) for batch_size in CUTS}
    assert {size: run[1].gradient_accumulation_steps for size, run in runs.items()} == CUTS
    assert len(runs[12][1].loss_history) == 6
    for batch_size, run in runs.items():
        assert difference(runs[12], run) < 1e-9, batch_size


def test_the_physical_batch_changes_nothing_if_classes_are_balanced() -> None:
    for name, arguments in BALANCED.items():
        assert difference(trained(name, 12, **arguments), trained(name, 5, **arguments)) < 1e-9, name


def test_sorting_rows_by_length_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "token classification, BERT"
    in_order_of_length = trained(name, 3)
    monkeypatch.setattr("ftaccum.data.dataset.Rows.lengths", lambda *_: None)
    in_order_of_arrival = trained(name, 3)
    assert in_order_of_length[1].padding_fraction < in_order_of_arrival[1].padding_fraction
    assert difference(in_order_of_arrival, in_order_of_length) < 1e-9


def test_the_recipe_changes_the_result() -> None:
    """A control: the comparison detects different runs."""
    one, other = (trained(NAMES[1], 4, random_seed=seed) for seed in (1, 2))
    assert difference(one, other) > 1e-3


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_change_nothing(two_processes: Callable[..., str], tmp_path: Path) -> None:
    """Also if windows cross the end of an epoch or grow, classes are balanced, and the tracker or the disk fails."""
    alone = {name: trained(name, 12) for name in NAMES}
    growing = [trained(NAMES[2], **cut_otherwise(arguments, 4)) for arguments in CHANGING]
    balanced = {name: trained(name, 12, **arguments) for name, arguments in BALANCED.items()}
    assert min(difference(alone[name], run) for name, run in balanced.items()) > 1e-3
    torch.save((alone, growing, balanced), tmp_path / "alone.pt")
    (tmp_path / "out" / "result.json").mkdir(parents=True)
    printed = two_processes("invariance_of_two.py", str(tmp_path / "alone.pt"), str(tmp_path / "out"))
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("FOUND "))[6:])
    assert len(found["differences"]) == 9 + 6 + 2 + 1
    assert max(found["differences"].values()) < 1e-9, found
    assert len(found["gradients"]) == 5
    assert max(found["gradients"]) < 1e-10, found
    assert HEADS.keys() >= set(NAMES)
    (done, unwritten), (done_by_other, told_to_other) = found["told"]
    assert done == ["start", "config", *5 * ["log"], "finish"]
    assert done_by_other == []
    assert told_to_other == unwritten
    (sentence,) = unwritten
    assert "result.json' cannot be written: IsADirectoryError" in sentence
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
