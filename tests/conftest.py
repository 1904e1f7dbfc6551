import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

# Before torch is imported: two OpenMP threads beside another busy process are far slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def _caches_of_their_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics and tokenised tables are cached by `evaluate` and `datasets`; not in the user's home, here."""
    folder = tmp_path_factory.getbasetemp() / "caches"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(folder / "metrics"))


@pytest.fixture
def two_processes() -> Callable[..., str]:
    """Runs a script of this folder under torchrun on two CPU processes (gloo), and returns what it printed.

    `accelerate.debug_launcher` would not do: after any Accelerator in the parent its children each believe that they
    are alone. The scripts assert that there are two.
    """

    def run(script: str, *arguments: str) -> str:
        path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run(
            [*command, str(TESTS / "processes" / script), *arguments],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
