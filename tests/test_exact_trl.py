"""`exact` on TRL's trainers: windows have the gradient of one batch, or a warning says that they cannot."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from ftaccum import InexactLossWarning, exact
from heads import relative_error
from preferences import cases

CASES = cases()
EXACT = [name for name, case in CASES.items() if case.is_exact]
INEXACT = [name for name, case in CASES.items() if not case.is_exact]
NEAR, FAR = 1e-6, 0.1  # TRL computes its losses in float32
FAST = ("DPO", "SFT, packed", "KTO")

pytestmark = pytest.mark.filterwarnings("ignore")


def slow_unless_fast(names: list[str]) -> list[Any]:
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


def errors(name: str, trainer_class: Any) -> tuple[list[float], bool]:
    """Return the error of each window's gradient, and whether the loss was reported as inexact."""
    wanted = CASES[name].one_batch()
    with warnings.catch_warnings(record=True) as issued:
        warnings.simplefilter("always")
        found, _ = CASES[name].gradients(trainer_class, batch_size=2, k=4)
    reported = any(issubclass(each.category, InexactLossWarning) for each in issued)
    return [relative_error(f, w) for f, w in zip(found, wanted, strict=True)], reported


@pytest.mark.parametrize("name", slow_unless_fast(EXACT))
def test_windows_of_a_trainer_of_trl_are_exact(name: str) -> None:
    found, reported = errors(name, exact(CASES[name].trainer_class))
    assert max(found) < NEAR
    assert not reported


@pytest.mark.parametrize("name", slow_unless_fast(INEXACT))
def test_a_loss_of_trl_that_mixes_rows_or_means_is_reported(name: str) -> None:
    assert errors(name, exact(CASES[name].trainer_class))[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DPO", "Reward", "KTO, apo_zero_unpaired"])
def test_unchanged_trainers_of_trl_are_far_off_in_a_short_window(name: str) -> None:
    assert errors(name, CASES[name].trainer_class)[0][-1] > FAR


@pytest.mark.slow
def test_windows_of_trainers_of_trl_are_exact_on_two_processes(two_processes: Any, tmp_path: Path) -> None:
    file = tmp_path / "one_batches.pt"
    torch.save({name: CASES[name].one_batch() for name in EXACT}, file)
    output = two_processes("trl_of_two.py", str(file))
    found = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert found.keys() == set(EXACT)
    assert {name: error for name, error in found.items() if not error < NEAR} == {}
