"""The folder of a run: its location, and the lock that keeps other runs out."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ftaccum.errors import CheckpointError, SettingsError
from ftaccum.runtime.run_dir import RunDir
from ftaccum.tracking import export
from interrupted import fine_tuned

IS_LOCKED = "import sys; from ftaccum.runtime.run_dir import RunDir; print(RunDir.resolve(sys.argv[1]).is_locked())"


def is_locked_for_others(folder: Path) -> bool:
    asked = subprocess.run([sys.executable, "-c", IS_LOCKED, str(folder)], capture_output=True, text=True, check=True)
    return asked.stdout.strip() == "True"


@pytest.mark.slow
def test_a_relative_folder_stays_where_it_was_after_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    save = export.save_model

    def after_a_change(*arguments: Any, **options: Any) -> None:
        os.chdir(elsewhere)
        save(*arguments, **options)

    monkeypatch.setattr(export, "save_model", after_a_change)
    run = fine_tuned(output_dir="run", checkpoint_every=3)
    assert run.result.output_dir == str(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "run.json", "ledger.jsonl", "result.json", "model", "checkpoints",
    }  # fmt: skip
    assert list(elsewhere.iterdir()) == []


def test_the_users_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunDir.resolve("~/run").path == tmp_path / "run"


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = pytest.raises(SettingsError, match=r"`output_dir` .*file/run', which cannot be created")
    with refused, RunDir(tmp_path / "file" / "run").lock():
        pass


def test_a_run_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="but are not installed"):
        fine_tuned(output_dir=str(tmp_path / "run"), log_with="dvclive")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_lock_is_held_until_the_model_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    save = export.save_model

    def watched(*arguments: Any, **options: Any) -> None:
        seen.append(is_locked_for_others(tmp_path))
        save(*arguments, **options)

    monkeypatch.setattr(export, "save_model", watched)
    fine_tuned(output_dir=str(tmp_path))
    assert seen == [True]
    assert not is_locked_for_others(tmp_path)


def test_a_second_run_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with RunDir(tmp_path).lock(), pytest.raises(CheckpointError, match="but another run is using it"):
        fine_tuned(output_dir=str(tmp_path))


def test_a_new_run_gets_a_new_folder_for_its_trackers(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert run_dir.tracker_folder(continues=True).name == "1"  # the run before had no trackers
    for n in range(1, 12):
        folder = run_dir.tracker_folder(continues=False)
        assert folder == tmp_path / "trackers" / str(n)
        folder.mkdir(parents=True)
        assert run_dir.tracker_folder(continues=True) == folder
    (tmp_path / "trackers" / "notes").mkdir()
    assert run_dir.tracker_folder(continues=False).name == "12"


HOLDS_WITH_A_CHILD = """
import os, sys, time
from ftaccum.runtime.run_dir import RunDir
with RunDir.resolve(sys.argv[1]).lock():
    if os.fork() == 0:
        print("locked", flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(600)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked on Unix only")
def test_a_killed_run_leaves_no_lock_to_its_workers(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS_WITH_A_CHILD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as run:
        try:
            assert run.stdout is not None
            assert run.stdout.readline() == b"locked\n"
            assert RunDir(tmp_path).is_locked()
            run.kill()
            run.wait()
            assert not RunDir(tmp_path).is_locked()  # although its child is still running
        finally:
            os.killpg(run.pid, signal.SIGKILL)
