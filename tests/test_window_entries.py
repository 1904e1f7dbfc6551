"""The numbers of a window in the ledger: tokens, clipping, times and memory."""

import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from ftaccum import test_fine_tuning
from ftaccum.runtime.device_state import is_idle, peak_memory
from ftaccum.tracking.ledger import Ledger, WindowEntry
from ftaccum.tracking.phase_timer import PhaseTimer
from heads import HEADS, all_in_float64
from training_passes import is_training_pass

LM = HEADS["causal LM, Llama"]


class Observer(TrainerCallback):
    """Observes a run from outside: positions that the model embeds, clipped gradients, and the time of training."""

    def __init__(self, model: nn.Module, max_norm: float) -> None:
        self.model, self.max_norm = model, max_norm
        self.positions: list[int] = []
        self.coefficients: list[float] = []
        self._norm_before = math.nan
        self._seen = 0
        embeddings: Any = model.get_submodule("model.embed_tokens")
        embeddings.register_forward_pre_hook(self._embedded)

    def _embedded(self, _: nn.Module, inputs: Any) -> None:
        self._seen += inputs[0].numel() if is_training_pass() else 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._seen = 0

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.coefficients.append(float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt()))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.positions.append(self._seen)


def trained(folder: Path, **arguments: Any) -> tuple[list[WindowEntry], Observer]:
    """Train on 11 ragged rows, in windows of 6 and 5."""
    with all_in_float64():
        model = LM.model()
        observer = Observer(model, arguments.get("gradient_clip_norm", math.inf))
        test_fine_tuning(
            model, train_data=LM.rows(11), validation_split=0.0, n_epochs=2, batch_size=2, effective_batch_size=6,
            output_dir=str(folder), audit=False, progress=False, callbacks=[observer], **arguments,
        )  # fmt: skip
    return Ledger.read(folder / "ledger.jsonl").windows, observer


def test_tokens_and_positions_are_those_of_the_rows_and_of_the_batches(tmp_path: Path) -> None:
    windows, observer = trained(tmp_path, planner=False)
    lengths = [len(row["input_ids"]) for row in LM.rows(11)]
    assert [windows[n].tokens + windows[n + 1].tokens for n in (0, 2)] == 2 * [sum(lengths)]
    assert [window.positions for window in windows] == observer.positions
    assert all(window.positions > window.tokens for window in windows[::2])


def test_the_clip_coefficient_is_the_ratio_of_the_norms_after_and_before_clipping(tmp_path: Path) -> None:
    for n, max_norm in enumerate((0.5, 100.0, None)):
        windows, observer = trained(tmp_path / str(n), gradient_clip_norm=max_norm)
        for window, norm_after in zip(windows, observer.coefficients, strict=True):
            assert window.clip_coefficient == pytest.approx(norm_after / window.grad_norm, rel=1e-12)
            assert (window.clip_coefficient < 1) == (max_norm == 0.5)
