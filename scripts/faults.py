"""Cause each fault once in a small run, and print what the user sees.

OMP_NUM_THREADS=1 .venv/bin/python scripts/faults.py
"""

import contextlib
import errno
import io
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from accelerate.tracking import GeneralTracker
from torch import nn
from torch.utils.data import Dataset

import ftaccum
from forking import Team
from ftaccum.checkpoint.format import Snapshot
from ftaccum.training.run import TrainingRun
from storm_runs import N_ROWS, Row, Wavering, row

# Beginnings of the lines that every run prints.
_USUAL = (
    *("===", "FINE-TUNING", "Training samples", "Batch size", "Gradient acc", "Processes", "Effective", "Updates per"),
    *("Epochs", "Validation samples", "Loss:", "Micro-batches", "Precision", "   ", "final loss", "best val", "time"),
    *("updates", "passes", "outputs", "Outputs", "To resume the run if", "To extend the run,"),
)


class Rows(Dataset[Row]):
    """Rows of which one has a side effect when it is read."""

    def __init__(self, bad: int = -1, does: Callable[[], None] = lambda: None) -> None:
        self.bad, self.does = bad, does

    def __len__(self) -> int:
        return N_ROWS

    def __getitem__(self, index: int) -> Row:
        if index == self.bad:
            self.does()
        return row(index) | {"noise": 0.0}


class Failing(GeneralTracker):
    """A tracker whose server is down."""

    name, requires_logging_directory, tracker = "failing", False, None

    def store_init_configuration(self, values: Any) -> None: ...

    def log(self, values: Any, step: int | None = None, **_: Any) -> None:  # noqa: ARG002
        raise ConnectionError("the server is gone")


def run(folder: Path, model: nn.Module | None = None, **settings: Any) -> None:
    defaults: dict[str, Any] = {
        "train_data": Rows(), "n_epochs": 1, "batch_size": 4, "gradient_accumulation_steps": 2,
        "progress": False, "on_inexact": "ignore", "output_dir": str(folder), "validation_split": 0.0,
    }  # fmt: skip
    ftaccum.test_fine_tuning(model or Wavering(), **defaults | settings)


def not_finite(folder: Path) -> None:
    rows = [row(n) | {"noise": float("inf") if n == 47 else 0.0} for n in range(N_ROWS)]
    run(folder, train_data=rows)


def full_disk(folder: Path) -> None:
    write = Snapshot.write

    def fails(self: Snapshot, place: Path) -> None:
        if "00000006" in place.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, place)

    with patch.object(Snapshot, "write", fails):
        run(folder, checkpoint_every=3)


def damaged(folder: Path) -> None:
    with patch.object(TrainingRun, "_finish", lambda _: None):  # as if it was killed right before
        run(folder, checkpoint_every=3)
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    file = newest / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:1000])
    run(folder, resume="auto")


def other_settings(folder: Path) -> None:
    run(folder, checkpoint_every=3)
    run(folder, resume="auto", learning_rate=1e-3, gradient_accumulation_steps=4)


def dead_worker(folder: Path) -> None:
    main, flag = os.getpid(), folder.with_suffix(".died")

    def die() -> None:
        if os.getpid() != main and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    run(folder, train_data=Rows(97, die), num_workers=2)


def dead_tracker(folder: Path) -> None:
    run(folder, log_with=Failing())


def bad_row(folder: Path) -> None:
    def fail() -> None:
        raise OSError("the file is gone")

    run(folder, train_data=Rows(97, fail))


def asked_to_stop(folder: Path) -> None:
    model = Wavering()
    passes = iter(range(1000))
    model.register_forward_hook(
        lambda *_: os.kill(os.getpid(), signal.SIGTERM) if torch.is_grad_enabled() and next(passes) == 9 else None
    )
    run(folder, model)


def lost_process(folder: Path) -> None:
    """Train on two processes, and kill one of them during training."""
    logs = [folder.with_suffix(f".{rank}") for rank in (0, 1)]

    def work(_: int) -> int:
        run(folder, n_epochs=500, checkpoint_every=3)
        return 0

    with contextlib.redirect_stdout(sys.__stdout__):  # the processes redirect it themselves
        team = Team(work, logs)
    assert team.until(lambda: any((folder / "checkpoints").glob("update-*")), within=120), logs[0].read_text()
    team.send(1, signal.SIGKILL)
    killed_at = time.monotonic()
    assert team.over(within=120)
    print(next(line for line in reversed(logs[0].read_text().splitlines()) if "LostProcessError" in line))
    print(f"(The other process ended {time.monotonic() - killed_at:.1f} s after the first was killed.)")


FAULTS = {
    "A process of two that dies": lost_process,  # must come first: it forks processes, which no run may precede
    "A loss that is not finite": not_finite,
    "A disk that is full": full_disk,
    "A checkpoint that is damaged": damaged,
    "Other settings than the checkpoint's": other_settings,
    "A worker that dies": dead_worker,
    "A tracker that fails": dead_tracker,
    "A row that raises": bad_row,
    "SIGTERM": asked_to_stop,
}


def told(fault: Callable[[Path], None], folder: Path) -> str:
    """Return what a fault prints, warns and raises, without the lines that every run prints."""
    printed, ending = io.StringIO(), ""
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        try:
            fault(folder)
        except (Exception, SystemExit) as error:
            ending = f"{type(error).__name__}: {error}"
    lines = [line for line in printed.getvalue().splitlines() if line and not line.startswith(_USUAL)]
    lines += [f"{w.category.__name__}: {w.message}" for w in warned if issubclass(w.category, UserWarning)]
    return "\n".join([*lines, *([ending] if ending else [])]).replace(str(folder), "outputs/run")


def main() -> None:
    scratch = Path(tempfile.mkdtemp())
    try:
        for n, (name, fault) in enumerate(FAULTS.items()):
            print(f"## {name}\n\n{told(fault, scratch / str(n))}\n")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
