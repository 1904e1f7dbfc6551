"""Runs that are asked to stop: they finish the current update, save, and exit with a special status."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import ftaccum.runtime.signals
from ftaccum import Preempted
from ftaccum.runtime.signals import StopSignals
from interrupted import checkpoints_of, fine_tuned, model, uninterrupted, updates_of
from training_passes import is_training_pass


def asked_to_stop(number: int, at_pass: int, times: int = 1) -> nn.Module:
    """Return a model that sends its process a signal in the middle of an update."""
    trained = model()

    def ask(module: Any, *_: Any) -> None:
        if is_training_pass() and module.training and module.n_seen == at_pass:
            for _ in range(times):
                os.kill(os.getpid(), number)

    trained.register_forward_hook(ask)
    return trained


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow), signal.SIGINT]
)
def test_a_signal_stops_the_run_after_the_current_update(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(number)
    ending: type[BaseException] = KeyboardInterrupt if number == signal.SIGINT else Preempted
    with pytest.raises(ending) as ended:
        fine_tuned(asked_to_stop(number, at_pass=4 * 4 + 2), output_dir=str(tmp_path))
    there = tmp_path / "checkpoints" / "update-00000005"
    assert str(ended.value) == (
        f"Stopped after update 5, as requested. The newest checkpoint is {there}. To resume, make the same call with "
        "`resume='auto'` (`--resume auto`)."
    )
    assert number == signal.SIGINT or ended.value.code == 75  # type: ignore[attr-defined]
    assert checkpoints_of(tmp_path) == [there.name]
    assert len(updates_of(tmp_path)) == 5
    assert (
        "Asked to stop: finishing the current update first. Press Ctrl-C (again) to stop at once."
        in capsys.readouterr().err
    )
    assert signal.getsignal(number) == handler
    again = fine_tuned(output_dir=str(tmp_path), resume="auto")
    assert uninterrupted().differences(again) == []


@pytest.mark.slow
def test_a_signal_during_evaluation_stops_the_run_after_it(tmp_path: Path) -> None:
    trained, asked = model(), []

    def ask(module: Any, *_: Any) -> None:
        if not module.training and module.n_seen > 4 * 6 and not asked:
            asked.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    trained.register_forward_hook(ask)
    with pytest.raises(Preempted, match="Stopped after update 7"):
        fine_tuned(trained, output_dir=str(tmp_path))
    assert checkpoints_of(tmp_path) == ["update-00000007-epoch-0001"]
    assert uninterrupted().differences(fine_tuned(output_dir=str(tmp_path), resume="auto")) == []


@pytest.mark.slow
def test_a_forwarded_signal_counts_once_and_a_later_one_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt, match="Stopped after update 5"):
        fine_tuned(asked_to_stop(signal.SIGINT, at_pass=4 * 4 + 2, times=3), output_dir=str(tmp_path))
    monkeypatch.setattr(ftaccum.runtime.signals, "_TWICE", -1.0)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        fine_tuned(asked_to_stop(signal.SIGINT, at_pass=4 * 4 + 2, times=2), output_dir=str(tmp_path / "at once"))
    assert updates_of(tmp_path / "at once") == []


@pytest.mark.slow
def test_without_a_folder_only_ctrl_c_stops_after_the_current_update() -> None:
    trained = asked_to_stop(signal.SIGINT, at_pass=4 * 4 + 2)
    with pytest.raises(KeyboardInterrupt, match=r"Stopped after update 5, as requested. No checkpoint was kept.$"):
        fine_tuned(trained)
    assert all(p.grad is None for p in trained.parameters())
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
    try:
        ended = fine_tuned(asked_to_stop(signal.SIGTERM, at_pass=18))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard
    assert ended.result.optimizer_steps == 14


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under `nohup`
    try:
        ended = fine_tuned(asked_to_stop(signal.SIGINT, at_pass=18), output_dir=str(tmp_path))
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.result.optimizer_steps == 14


@pytest.mark.slow
def test_a_run_in_a_thread_handles_no_signals(tmp_path: Path) -> None:
    ended: list[Any] = []
    thread = threading.Thread(target=lambda: ended.append(fine_tuned(output_dir=str(tmp_path))))
    thread.start()
    thread.join()
    assert ended[0].result.optimizer_steps == 14


def test_nested_signal_handling_installs_one_handler() -> None:
    stop_signals = StopSignals("", (signal.SIGUSR1,))
    before = signal.getsignal(signal.SIGUSR1)
    with stop_signals.kept():
        with stop_signals.kept():
            pass
        assert signal.getsignal(signal.SIGUSR1) == stop_signals._keep
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_scheduler_that_warns_again_does_not_stop_a_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ftaccum.runtime.signals, "_TWICE", -1.0)
    with pytest.raises(Preempted, match="Stopped after update 5"):
        fine_tuned(asked_to_stop(signal.SIGTERM, at_pass=4 * 4 + 2, times=3), output_dir=str(tmp_path))
    assert checkpoints_of(tmp_path) == ["update-00000005"]


def test_a_closed_terminal_does_not_stop_a_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(sentence: str, **_: Any) -> None:
        if sentence.startswith("Asked to stop"):
            raise BrokenPipeError

    monkeypatch.setattr("ftaccum.runtime.signals.tqdm.write", fail)
    with pytest.raises(Preempted, match="Stopped after update 5"):
        fine_tuned(asked_to_stop(signal.SIGTERM, at_pass=4 * 4 + 2), output_dir=str(tmp_path))
