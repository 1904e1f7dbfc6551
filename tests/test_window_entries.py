"""The numbers of a window in the ledger: tokens, clipping, times and memory."""

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import psutil
import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from ftaccum import test_fine_tuning
from ftaccum.runtime.device_state import is_idle, peak_memory
from ftaccum.tracking.ledger import Entry, WindowEntry
from ftaccum.tracking.ledger_file import LedgerFile
from ftaccum.tracking.phase_timer import PhaseTimer
from heads import HEADS, all_in_float64
from test_nonfinite import Normed, points, run
from training_passes import is_training_pass

LM = HEADS["causal LM, Llama"]


class Observer(TrainerCallback):
    """Observes a run from outside: positions that the model embeds, and norms of clipped gradients, by update."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.positions: list[int] = []
        self.clipped_norms: list[float] = []
        self._seen = 0
        embeddings: Any = model.get_submodule("model.embed_tokens")
        embeddings.register_forward_pre_hook(self._embedded)

    def _embedded(self, _: nn.Module, inputs: Any) -> None:
        self._seen += inputs[0].numel() if is_training_pass() else 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._seen = 0

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        gradients = [p.grad.flatten() for p in self._model.parameters() if p.grad is not None]
        self.clipped_norms.append(float(torch.cat(gradients).norm()))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.positions.append(self._seen)


def trained(folder: Path, n_rows: int = 11, **arguments: Any) -> tuple[list[WindowEntry], Observer]:
    """Train on ragged rows for two epochs, each with a window of 6 and one of 5."""
    with all_in_float64():
        model = LM.model()
        observer = Observer(model)
        test_fine_tuning(
            model, train_data=LM.rows(n_rows), validation_split=0.0, n_epochs=2, batch_size=2,
            output_dir=str(folder), audit=False, progress=False, callbacks=[observer],
            **{"effective_batch_size": 6} | arguments,
        )  # fmt: skip
    return LedgerFile.read(folder / "ledger.jsonl").ledger.windows, observer


def test_tokens_and_positions_are_those_of_the_rows_and_of_the_batches(tmp_path: Path) -> None:
    windows, observer = trained(tmp_path, planner=False)
    lengths = [len(row["input_ids"]) for row in LM.rows(11)]
    assert [windows[n].tokens + windows[n + 1].tokens for n in (0, 2)] == 2 * [sum(lengths)]
    assert [window.positions for window in windows] == observer.positions
    assert all(window.positions > window.tokens for window in windows[::2])


def test_the_clip_coefficient_is_the_ratio_of_the_norms_after_and_before_clipping(tmp_path: Path) -> None:
    for n, max_norm in enumerate((0.5, 100.0)):
        windows, observer = trained(tmp_path / str(n), gradient_clip_norm=max_norm)
        for window, norm_after in zip(windows, observer.clipped_norms, strict=True):
            assert window.clip_coefficient == pytest.approx(norm_after / window.grad_norm, rel=1e-12)
            assert (window.clip_coefficient < 1) == (max_norm == 0.5)


@pytest.mark.slow
@pytest.mark.processes
def test_tokens_and_memory_are_those_of_all_processes(two_processes: Callable[..., str], tmp_path: Path) -> None:
    printed = two_processes("window_entries_of_two.py", str(tmp_path))
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("FOUND")).removeprefix("FOUND"))
    windows = [WindowEntry(**values) for values in found["windows"]]
    lengths = [len(row["input_ids"]) for row in LM.rows(16)]
    assert [windows[n].tokens + windows[n + 1].tokens for n in (0, 2)] == 2 * [sum(lengths)]
    assert [w.positions for w in windows] == [sum(of_each) for of_each in zip(*found["positions"], strict=True)]
    assert {w.peak_memory for w in windows} == {10**12 + 7}
    for window, norms in zip(windows, zip(*found["norms"], strict=True), strict=True):
        assert [window.clip_coefficient * window.grad_norm] * 2 == pytest.approx(norms, rel=1e-12)
    # One reduction a window counts its loss items, and one an epoch has the losses, tokens and memory of both windows.
    assert [shape for shape in found["reductions"] if len(shape) == 2] == 2 * [[2, 6]]


class Slow(TrainerCallback):
    """Slows down a run in known places: 4 ms a training pass, 6 ms a step, and 50 ms an evaluation or an update."""

    def __init__(self, model: nn.Module) -> None:
        self.evaluations = self.updates = 0.0
        self.elapsed = -math.inf
        model.register_forward_pre_hook(self._pass)

    def _pass(self, model: nn.Module, _: Any) -> None:
        if model.training and is_training_pass():
            time.sleep(0.004)
        elif not model.training and self.elapsed > 0:
            time.sleep(0.05)
            self.evaluations += 0.05

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()
        self.elapsed = math.inf

    def on_step_end(self, *_: Any, **__: Any) -> None:
        time.sleep(0.05)
        self.updates += 0.05

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.elapsed = time.perf_counter() - self._began


class SlowSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        time.sleep(0.006)
        return super().step(closure)


class SlowRows(torch.utils.data.Dataset):
    """Rows that each take 3 ms to read, once training has begun."""

    def __init__(self, slow: Slow, rows: list[Any]) -> None:
        self._slow, self._rows = slow, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, n: int) -> Any:
        time.sleep(0.003 if self._slow.elapsed > 0 else 0)
        return self._rows[n]


def test_times_are_those_of_their_phase_and_leave_out_audits_evaluations_and_callbacks(tmp_path: Path) -> None:
    model = LM.model()
    slow = Slow(model)
    result = test_fine_tuning(
        model, train_data=SlowRows(slow, LM.rows(12)), val_data=LM.rows(3, seed=8), n_epochs=2, batch_size=2,
        effective_batch_size=6, optimizer=SlowSGD(model.parameters(), 0.1), audit=2, callbacks=[slow],
        output_dir=str(tmp_path), progress=False,
    )  # fmt: skip
    windows = LedgerFile.read(tmp_path / "ledger.jsonl").ledger.windows
    for window in windows:
        assert window.pass_seconds >= 3 * 0.004
        assert window.optimizer_seconds >= 0.006
        assert window.data_seconds >= 0
    data = sum(window.data_seconds for window in windows)
    assert data >= 24 * 0.003  # each row is read once an epoch, most of them while another window is computed
    elsewhere = slow.evaluations + slow.updates + sum(audit["seconds"] for audit in result.audits)
    assert slow.evaluations >= 0.1
    assert result.audits
    assert data + sum(w.pass_seconds + w.optimizer_seconds for w in windows) <= slow.elapsed - elsewhere


def test_peak_memory_grows_to_that_of_the_process(tmp_path: Path) -> None:
    windows, _ = trained(tmp_path)
    peaks = [window.peak_memory for window in windows]
    assert peaks == sorted(peaks)
    assert 0.5 * psutil.Process().memory_info().rss <= peaks[-1] <= peak_memory(torch.device("cpu"))
    assert peaks[-1] < psutil.virtual_memory().total


def test_a_window_without_a_finite_gradient_has_no_clip_coefficient(tmp_path: Path) -> None:
    run(Normed(), points(), output_dir=str(tmp_path), audit=False)
    windows = LedgerFile.read(tmp_path / "ledger.jsonl").ledger.windows
    assert [math.isnan(window.clip_coefficient) for window in windows] == [window.skipped for window in windows]
    assert [window.skipped for window in windows].count(True) == 1


def test_the_entries_of_earlier_versions_still_load(tmp_path: Path) -> None:
    trained(tmp_path)
    path, new = tmp_path / "ledger.jsonl", r', "(tokens|positions|clip_coefficient|\w+_seconds|peak_memory)": [^,}]*'
    path.write_text(re.sub(new, "", path.read_text()))
    assert "tokens" not in json.loads(path.read_text().splitlines()[0])
    first, *others = LedgerFile.read(path).ledger.windows
    assert (len(others), first.rows, first.passes) == (3, 6, 3)
    assert (first.tokens, first.positions, first.peak_memory) == (0, 0, 0)
    assert all(map(math.isnan, (first.clip_coefficient, first.data_seconds, first.pass_seconds)))


def test_a_phase_inside_another_interrupts_it() -> None:
    timer = PhaseTimer()
    with timer.phase("optimizer"):
        with timer.phase("passes"):
            time.sleep(0.02)
        time.sleep(0.01)
    time.sleep(0.2)
    seconds = timer.take()
    assert seconds.passes >= 0.02
    assert seconds.optimizer >= 0.01
    assert seconds.passes + seconds.optimizer < 0.2
    assert timer.take().passes == 0


def test_loading_that_a_busy_device_does_not_wait_for_counts_as_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, streams = PhaseTimer(), iter([False, True])
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda _: SimpleNamespace(query=lambda: next(streams)))
    for name in ("passes", "data"):
        with timer.phase("data"):
            time.sleep(0.01)
            if not is_idle(torch.device("cuda")):
                timer.count_as("passes")
        seconds = timer.take()
        assert (seconds.passes if name == "passes" else seconds.data) >= 0.01
        assert (seconds.data if name == "passes" else seconds.passes) == 0


def documented(section: str) -> list[str]:
    """Return the names in the first column of a table of docs/ledger.md."""
    page = (Path(__file__).parents[1] / "docs" / "ledger.md").read_text(encoding="utf-8")
    table = page.split(f"\n### `{section}`")[1].split("\n#")[0]
    return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


@pytest.mark.parametrize("kind", get_args(Entry), ids=lambda kind: kind.__name__)
def test_the_docs_have_all_fields_of_an_entry_in_order(kind: type[Entry]) -> None:
    names = [field.name for field in fields(kind)]
    assert documented(names[0]) == names
