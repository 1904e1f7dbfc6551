"""`docs/teaching/measuring.py`: the memory that the teaching pages show."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def measuring() -> ModuleType:
    """The module under a name of its own: `scripts/` has another one called `measuring`."""
    name = "teaching_measuring"
    spec = importlib.util.spec_from_file_location(
        name, Path(__file__).parents[1] / "docs" / "teaching" / "measuring.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def take(megabytes: int) -> int:
    return len(bytearray(megabytes * 1_000_000))


def test_each_run_is_measured_without_the_memory_of_the_runs_before_and_of_this_process(measuring: ModuleType) -> None:
    own = bytearray(200_000_000)
    large, small = measuring.measure_each(take, [(100,), (10,)])
    assert large.peak_mb == pytest.approx(100, abs=1)
    assert small.peak_mb == pytest.approx(10, abs=1)
    assert small.result == 10_000_000
    assert own


def test_a_run_that_fails_raises_its_error(measuring: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)measured `take` failed.*string argument without an encoding"):
        measuring.measure(take, "many")
