"""Runs that are interrupted, and the complete runs that they are compared with."""

import functools
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ftaccum import Result, test_fine_tuning
from ftaccum.checkpoint.manager import CheckpointManager
from heads import HEADS, all_in_float64
from training_passes import is_training_pass

CLASSIFIER = HEADS["sequence classification, BERT"]


class CutOff(BaseException):
    """An end of the process in the middle of a run, which no handler of errors catches."""


def model() -> nn.Module:
    """Return a model with dropout, seeded weights, and a persistent and a non-persistent count in buffers."""
    made: Any = CLASSIFIER.model().float()
    torch.manual_seed(0)
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.05)
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    made.register_forward_hook(_counts_passes)
    made.register_buffer("n_passes", torch.zeros(()), persistent=True)
    made.register_buffer("n_seen", torch.zeros(()), persistent=False)
    return made


def _counts_passes(module: Any, *_: Any) -> None:
    if is_training_pass() and module.training:
        module.n_passes += 1
        module.n_seen += 1


def fine_tuned(trained: nn.Module | None = None, cut_off_at: int | None = None, **arguments: Any) -> "Ended":
    """Train for two epochs of 54 rows in windows of 8 (14 updates), or until the middle of window `cut_off_at`.

    With `keep_checkpoints` above 2, all of them stay, as if the process had been killed right after the last one.
    """
    trained = trained if trained is not None else model()
    if cut_off_at is not None:
        _cut_off(trained, cut_off_at)
    defaults: dict[str, Any] = {
        "train_data": CLASSIFIER.rows(60), "n_epochs": 2, "batch_size": 2, "effective_batch_size": 8,
        "learning_rate": 1e-3, "lr_scheduler": "cosine", "warmup_steps": 2, "progress": False,
        "planner_costs": [64, 1, 0.0005] if arguments.get("planner", True) else None,
    }  # fmt: skip
    with _all_kept(arguments):
        result = test_fine_tuning(trained, **defaults | arguments)
    return Ended({name: t.clone() for name, t in trained.state_dict().items() if isinstance(t, Tensor)}, result)


@functools.cache
def uninterrupted() -> "Ended":
    """Return the run of `fine_tuned()`, which each process of tests needs once. Not to be changed."""
    return fine_tuned()


def _all_kept(arguments: dict[str, Any]) -> AbstractContextManager[Any]:
    kept = arguments.get("keep_checkpoints", 2) > 2
    return patch.object(CheckpointManager, "finish", lambda *_, **__: None) if kept else nullcontext()


def _cut_off(trained: nn.Module, window: int) -> None:
    """Raise `CutOff` at the third of the four forward passes of a window."""

    def end(module: nn.Module, *_: Any) -> None:
        if is_training_pass() and module.training and module.n_seen >= 4 * window + 2:
            raise CutOff

    trained.register_forward_pre_hook(end)


class Ended:
    """The weights and the result of a complete run."""

    def __init__(self, weights: dict[str, Tensor], result: Result) -> None:
        self.weights, self.result = weights, result

    def differences(self, other: "Ended") -> list[str]:
        """Return the names of weights and of numbers of the result that differ in any bit."""
        found = [name for name, t in self.weights.items() if not torch.equal(t, other.weights[name])]
        for name in ("loss", "grad_norm", "lr", "train_loss", "val_loss"):
            one, two = (getattr(run.result, f"{name}_history") for run in (self, other))
            found += [f"{name}_history"] if repr(one) != repr(two) else []
        for name in ("final_loss", "initial_loss", "best_update", "evaluation_updates", "metrics", "padding_fraction"):
            found += [name] if repr(self.result[name]) != repr(other.result[name]) else []
        return found + (["audits"] if self._audits() != other._audits() else [])

    def _audits(self) -> list[dict[str, Any]]:
        return [audit | {"seconds": 0} for audit in self.result.audits]


def ledger_of(folder: Path) -> str:
    """Return a run's ledger without times and memory, which differ between any two runs."""
    return re.sub(r', "(\w*seconds|peak_memory)": [^,}]*', "", (folder / "ledger.jsonl").read_text())


def updates_of(folder: Path) -> list[str]:
    """Return the lines of a ledger for updates, without those for audits and epochs."""
    return [line for line in ledger_of(folder).splitlines() if '"window"' in line]


def without_audits(ledger: str) -> list[str]:
    """Return the lines of a ledger for updates, evaluations and epochs."""
    return [line for line in ledger.splitlines() if '"audit"' not in line]


def checkpoints_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def elastic(**arguments: Any) -> tuple[Result, dict[str, Tensor]]:
    """Train for 8 updates in float64: two epochs of 28 rows in windows of 8.

    Without dropout, whose random numbers would depend on the micro-batches. For `keep_checkpoints` see `fine_tuned`.
    """
    head = HEADS["token classification, BERT"]
    trained = head.model()
    defaults: dict[str, Any] = {"n_epochs": 2, "batch_size": 2, "effective_batch_size": 8}
    with all_in_float64(), _all_kept(arguments):
        result = test_fine_tuning(
            trained, train_data=head.rows(31), **defaults | arguments,
            validation_split=0.1, learning_rate=1e-3, progress=False,
        )  # fmt: skip
    return result, {name: t.clone() for name, t in trained.state_dict().items()}
