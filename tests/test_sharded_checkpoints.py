"""Sharded runs on two processes that are interrupted and resumed, there or on another number of processes."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from interrupted import elastic, updates_of


def far_from(weights: dict[str, Tensor], others: dict[str, Tensor]) -> list[str]:
    """Return the names of weights that differ by more than rounding."""
    return [name for name, t in weights.items() if not torch.allclose(t, others[name], rtol=1e-9, atol=1e-11)]


@pytest.mark.slow
@pytest.mark.processes
def test_sharded_runs_resume_to_the_bit_and_with_other_processes(
    two_processes: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = elastic(output_dir=str(tmp_path / "one"), checkpoint_every=3, keep_checkpoints=9)
    said = two_processes("sharded_resuming_of_two.py", str(tmp_path))
    found = json.loads(said.partition("FOUND ")[2].splitlines()[0])
    assert found.pop("heard") == [[75, "Stopped after update 2"]] * 2 or found
    assert "update-00000006" in found.pop("left")
    assert "update-00000003" not in found.pop("full left")
    assert {name: differences for name, differences in found.items() if differences} == {}
    assert len(found) > 5
    assert re.search(r"update-00000003 \(.* kB\) could not be written: process 1: No space left on device\.", said)

    for gone_on in torch.load(tmp_path / "gone_on.pt"):
        assert far_from(weights, gone_on) == []
    assert (
        updates_of(tmp_path / "two")[0].partition('"loss"')[0] == updates_of(tmp_path / "one")[0].partition('"loss"')[0]
    )
    capsys.readouterr()
    there = tmp_path / "two" / "checkpoints" / "update-00000006"
    assert (there / "shards" / "1.safetensors").exists()
    _, whole = elastic(resume=str(there))
    assert far_from(weights, whole) == []
    said = capsys.readouterr().err
    assert "and no row is skipped or repeated." in said
    assert "sharding None (was fsdp2)" in said
