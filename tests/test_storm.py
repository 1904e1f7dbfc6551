"""A small storm. A large one is `scripts/storm.py`."""

from collections.abc import Callable

import pytest


@pytest.mark.slow
@pytest.mark.processes
def test_runs_that_are_killed_end_as_if_nothing_had_happened(processes: Callable[..., str]) -> None:
    said = processes(1, "storm_of_two.py")  # which starts the others
    assert "| kills |" in said


@pytest.mark.slow
@pytest.mark.processes
def test_sharded_runs_that_are_killed_end_as_if_nothing_had_happened(processes: Callable[..., str]) -> None:
    said = processes(1, "storm_of_two.py", "sharded")
    assert "| kills |" in said
