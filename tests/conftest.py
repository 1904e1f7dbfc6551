import gc
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from launching import Launcher

# Nothing here imports torch on being imported: the process that only hands out tests to others would wait for it.

pytest_plugins = ["pytester"]

# Set before torch is imported: two OpenMP threads are far slower than one while another process is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A shell that starts the tests in the background makes them ignore Ctrl-C, which some tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).parent
OF_EXACT = {
    "test_exact_trainer.py", "test_exact_trainer_guards.py", "test_exact_trainer_refusals.py",
    "test_exact_trainer_windows.py", "test_exact_trl.py", "test_repeated_rows.py",
}  # fmt: skip
_LAUNCHER = pytest.StashKey[Launcher]()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out tests of `exact` with older versions of Transformers, which test_exact_trainer_versions.py tests."""
    if collection_path.name not in OF_EXACT:
        return None
    from transformers import Trainer

    return None if hasattr(Trainer, "loss_is_scaled_for_ga") else True


def pytest_collection_finish() -> None:
    """Hide what was imported from the garbage collector, which otherwise looks through all of it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed each test equally, so that its result depends on neither the order of tests nor earlier ones."""
    from accelerate.utils import set_seed

    set_seed(0)


_COUNTER = itertools.count()


@pytest.fixture(autouse=True)
def _caches_of_their_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the caches of `evaluate`, `datasets` and ftaccum out of the user's home."""
    folder = tmp_path_factory.getbasetemp() / "caches"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / str(next(_COUNTER))))  # a verdict of one test is of no other
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(folder / "metrics"))


@pytest.fixture(autouse=True)
def _accelerate_without_traces(request: pytest.FixtureRequest) -> Iterator[None]:
    """Clear the state that a Trainer's Accelerator leaves to the process, after tests of `exact`."""
    if not request.node.path.name.startswith(("test_exact", "test_repeated", "test_planned", "test_audit_batches")):
        yield
        return
    from ftaccum.runtime.accelerator import fresh_accelerate_state

    with fresh_accelerate_state():
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Fork the process that starts scripts, if a test needs it, while this one has imported all and run nothing.

    A process of its own would import everything again, which takes as long as most of the scripts.
    """
    if not session.config.option.collectonly and any("_launcher" in item.fixturenames for item in session.items):
        session.config.stash[_LAUNCHER] = Launcher()


@pytest.fixture(scope="session")
def _launcher(request: pytest.FixtureRequest) -> Iterator[Launcher]:
    launcher = request.config.stash[_LAUNCHER]
    yield launcher
    launcher.close()


@pytest.fixture
def processes(_launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return a function that runs a script of `processes/` on n CPU processes (gloo) and returns their output.

    `accelerate.debug_launcher` does not work here: once the parent has made an Accelerator, each child takes itself for
    a single process. The scripts assert the number of processes.
    """

    def run(n: int, script: str, *arguments: str) -> str:
        logs = [tmp_path_factory.mktemp("said") / str(rank) for rank in range(n)]
        job = {"script": str(TESTS / "processes" / script), "arguments": arguments, "logs": [str(log) for log in logs]}
        statuses = _launcher.statuses(job)
        said = "".join(log.read_text() for log in logs)
        assert statuses == [0] * n, said
        return said

    return run


@pytest.fixture
def two_processes(processes: Callable[..., str]) -> Callable[..., str]:
    return partial(processes, 2)
