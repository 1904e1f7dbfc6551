"""Losses over the window on two processes: exact for any shares of the rows, and faults end all processes together."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from embedding_losses import trained
from heads import relative_error
from sharding import can_shard, needs_sharding

EXACT = 1e-10
ROUNDED = {"float32": 1e-5, "bf16 autocast": 5e-3}  # others in 16 bits: 3e-2, the rounding of one batch
FAST = [
    "scale in the loss, one row left",
    "by places, one row left",
    "dropout, drawing",
    "an input that the loss ignores",
    "sharded, each, scale in the loss",
    "Mixtral, 0.001",
]
SHARDED = ("DDP", "sharded")


def _tolerance(name: str) -> float:
    return ROUNDED.get(name, 3e-2 if "bf16" in name else EXACT)


def _check(printed: str) -> dict[str, float]:
    errors: dict[str, float] = json.loads(printed.split("ERRORS ", 1)[1].splitlines()[0])
    assert {name: e for name, e in errors.items() if not e <= _tolerance(name)} == {}
    return errors


def test_two_processes_have_the_gradient_of_one_batch(two_processes: Callable[..., str]) -> None:
    names = [name for name in FAST if can_shard or not name.startswith("sharded")]
    assert _check(two_processes("windows_of_two.py", *names)).keys() == set(names)


@pytest.mark.slow
@pytest.mark.parametrize("cases", ["whole", pytest.param("sharded", marks=needs_sharding)])
def test_every_case_is_exact_on_two_processes(two_processes: Callable[..., str], cases: str) -> None:
    assert len(_check(two_processes("windows_of_two.py", cases))) >= 16


@pytest.mark.slow
@needs_sharding
def test_faults_and_resumed_runs_on_two_processes(two_processes: Callable[..., str], tmp_path: Path) -> None:
    found = json.loads(two_processes("window_faults_of_two.py", str(tmp_path)).split("FOUND ", 1)[1].splitlines()[0])
    _check_out_of_memory(found)
    assert found["sharded as whole"] <= EXACT
    one, other = found["scales"]
    assert one == other != 0.7  # trained, from the main process's number, to the same one
    for name in SHARDED:
        _check_ends(found, name)
    resumed = {name: same for name, same in found.items() if name.startswith("resumed")}
    assert len(resumed) == 6
    assert {json.dumps(same) for same in resumed.values()} == {"[[true, true], [true, true]]"}
    for name in SHARDED:
        n_audits, error, reference = found[f"audits, {name}"]
        assert (n_audits >= 2, reference) == (True, "one batch")
        assert error <= EXACT
    for message in found["refused"]:
        assert message.startswith("SettingsError: The model is sharded, but `loss_fn` reads its weight `log_scale`")
    _check_fewer_processes(tmp_path)


def _check_out_of_memory(found: dict[str, Any]) -> None:
    runs = {name: run for name, run in found.items() if name.startswith("out of memory")}
    assert len(runs) == 8
    for name, (count, off) in runs.items():
        assert count == 1, name
        assert off <= EXACT, name


def _check_ends(found: dict[str, Any], name: str) -> None:
    *both, kept = found[f"{name} loss out of memory"]
    assert all("Memory ran out while `loss_fn` computed the loss of all 5 rows" in said for said in both)
    assert (len(both), kept) == (2, "update-00000002")
    *both, kept = found[f"{name} loss of the user"]
    assert all("DataError: `loss_fn` raised ZeroDivisionError('a mistake')" in said for said in both)
    assert (len(both), kept) == (2, "update-00000002")
    assert found[f"{name} loss with a fault"] == ["DataError: no label"] * 2 + ["update-00000002"]
    for second in (False, True):
        *both, kept = found[f"{name} inputs {second}"]
        assert both == ["DataError: no text in row 3 (Process 1 raised this, so all processes stop.)"] * 2
        assert kept == "update-00000001"
    *both, kept, model = found[f"{name} drift"]
    assert all("On process 1 they differ by 1.0e-03 (relative); up to 1e-05" in said for said in both)
    assert all("on_inexact" not in said for said in both)
    assert (len(both), kept, model) == (2, "update-00000002", "model.safetensors")


def _check_fewer_processes(folder: Path) -> None:
    path = folder / "plain" / "checkpoints" / "update-00000002"
    again = trained(resume=str(path), n_epochs=3, checkpoint_every=1, keep_checkpoints=100)
    assert relative_error(again["weights"], torch.load(folder / "plain.pt")) <= 1e-9
