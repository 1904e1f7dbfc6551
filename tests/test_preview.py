"""`ftaccum preview`: what a run would do, without training."""

from pathlib import Path

import pytest
import torch

from ftaccum.apps.cli import main
from ftaccum.runtime.device_state import finish_work
from task_files import TEXTS, save_encoder, save_rows


def test_preview_shows_rows_sizes_memory_and_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": text, "label": ("bad", "good")[n % 2]} for n, text in enumerate(TEXTS)]
    words = ["--model", save_encoder(tmp_path / "m"), "--train_data", save_rows(tmp_path / "rows.jsonl", rows)]
    words += ["--effective_batch_size", "3", "--batch_size", "2", "--validation_split", "0", "--n_epochs", "2"]
    assert main(["preview", *words, "--rows", "2", "--progress", "no"]) == 0
    out = capsys.readouterr().out
    assert "--- row 0 of `train_data`: 3 tokens, loss items: 1\n  input_ids (3,): a good film\n" in out
    assert "  labels (): bad\n--- row 1 of `train_data`: 3 tokens" in out
    assert "row 2" not in out
    assert "Updates per epoch: 3 (2 full windows; the remainder of 1 rows" in out
    assert "Memory: " in out
    assert "s for an update of 2 passes" in out
    assert not (tmp_path / "outputs").exists()


def test_times_include_the_work_that_any_accelerator_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr("torch.accelerator.synchronize", waited.append)
    for kind in ("cpu", "xpu", "mps", "cuda"):
        finish_work(torch.device(kind))
    assert [device.type for device in waited] == ["xpu", "mps", "cuda"]
