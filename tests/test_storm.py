"""A small storm. A large one is `scripts/storm.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.processes
def test_runs_that_are_killed_end_as_if_nothing_had_happened() -> None:
    done = subprocess.run(
        [sys.executable, str(TESTS / "processes" / "storm_of_two.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
