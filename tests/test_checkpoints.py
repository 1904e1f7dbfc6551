"""Checkpoints on disk: which are kept, which are skipped, and the effect of failed writes on training."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ftaccum import CheckpointError
from ftaccum.checkpoint.compatibility import FORMAT
from ftaccum.checkpoint.directory import CheckpointDirectory
from ftaccum.checkpoint.format import Snapshot
from ftaccum.checkpoint.manager import CheckpointManager
from ftaccum.checkpoint.manifest import damage, seal
from ftaccum.insight.format import format_bytes
from interrupted import CutOff, checkpoints_of, fine_tuned, ledger_of, model, uninterrupted, without_audits


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with a checkpoint after every three updates."""
    folder = tmp_path_factory.mktemp("ended")
    fine_tuned(output_dir=str(folder), checkpoint_every=3, keep_checkpoints=100, restore_best_weights=True)
    return folder


def copied(ended: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ended, tmp_path / "run"))


@pytest.mark.slow
def test_the_newest_checkpoints_and_that_of_the_best_evaluation_remain(tmp_path: Path) -> None:
    with patch.object(CheckpointManager, "finish", lambda *_, **__: None):  # as if the run was killed at its end
        result = fine_tuned(output_dir=str(tmp_path), checkpoint_every=2, keep_checkpoints=2, n_epochs=4).result
    best = 1 + result.val_loss_history.index(min(result.val_loss_history))
    stay = ["update-00000026", "update-00000028", "update-00000028-epoch-0004"][-2:]
    assert checkpoints_of(tmp_path) == sorted({*stay, f"update-{7 * best:08d}-epoch-{best:04d}"})


def test_a_finished_run_keeps_its_newest_checkpoint_and_logs_its_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine_tuned(output_dir=str(tmp_path), learning_rate=0.05, audit=False)  # the first epoch is the best
    assert checkpoints_of(tmp_path) == ["update-00000014-epoch-0002"]
    newest = tmp_path / "checkpoints" / "update-00000014-epoch-0002"
    size = format_bytes(sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()))
    assert f"from which the run can be extended: {newest} ({size})." in capsys.readouterr().err

    fine_tuned(
        output_dir=str(tmp_path), keep_checkpoints=1, max_updates=2
    )  # sets the checkpoints of the first run aside
    shown = capsys.readouterr().err
    assert "Moved checkpoints of an earlier run" in shown
    assert f"Replaces the finished run in {str(tmp_path)!r}: " in shown
    assert [path.name for path in tmp_path.glob("checkpoints*")] == ["checkpoints"]
    assert checkpoints_of(tmp_path) == ["update-00000002-epoch-0001"]
    fine_tuned(output_dir=str(tmp_path), resume="auto", max_updates=3, allow_changed="max_updates")
    assert "Replaces the finished run" not in capsys.readouterr().err


def test_a_finished_run_without_checkpoints_is_neither_extended_nor_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: dict[str, Any] = {"output_dir": str(tmp_path), "checkpoint_every": 1, "keep_checkpoints": 0}
    arguments |= {"max_updates": 3, "audit": False}
    with pytest.raises(CutOff):
        fine_tuned(cut_off_at=2, **arguments)
    assert len(checkpoints_of(tmp_path)) == 1  # a killed run resumes from it
    (tmp_path / "checkpoints" / "damaged-update-00000001").mkdir()
    fine_tuned(resume="auto", **arguments)
    assert "Resuming after update" in (told := capsys.readouterr().err)
    assert "newest checkpoint stays" not in told
    assert not list(tmp_path.glob("checkpoints*"))

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for resume, named in (("auto", tmp_path), (str(tmp_path), tmp_path)):
        with pytest.raises(CheckpointError, match="because `keep_checkpoints` was 0") as refused:
            fine_tuned(**arguments | {"resume": resume, "max_updates": 4, "allow_changed": "max_updates"})
        assert f"{str(named)!r}, but that run has finished and cannot be extended: it kept no" in str(refused.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_finished_run_that_lost_its_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    fine_tuned(output_dir=str(tmp_path), max_updates=1)
    spoil(tmp_path / "checkpoints" / "update-00000001-epoch-0001" / "optimizer.pt", "truncated")
    with pytest.raises(CheckpointError, match="cannot be extended: its checkpoints are damaged"):
        fine_tuned(output_dir=str(tmp_path), max_updates=1, resume="auto")
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="cannot be extended: its checkpoint was removed"):
        fine_tuned(output_dir=str(tmp_path), max_updates=1, resume="auto")


def test_a_checkpoint_that_was_set_aside_stays_if_there_is_no_newer_one(tmp_path: Path) -> None:
    """A run that resumes from it at its end writes no checkpoint of its own."""
    fine_tuned(output_dir=str(tmp_path), max_updates=1)
    aside = tmp_path / "checkpoints.previous"
    (tmp_path / "checkpoints").rename(aside)
    (tmp_path / "checkpoints").mkdir()
    (aside / "update-00000001").mkdir()
    fine_tuned(output_dir=str(tmp_path), max_updates=1, resume=str(aside / "update-00000001-epoch-0001"))
    assert (aside / "update-00000001-epoch-0001" / "manifest.json").exists()


def test_checkpoints_that_cannot_be_removed_do_not_end_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(CheckpointDirectory, "finish", busy)
    assert fine_tuned(output_dir=str(tmp_path), max_updates=1).result.unwritten == []
    assert "could not be removed: [Errno 16] Device or resource busy." in capsys.readouterr().err


@pytest.mark.slow
def test_checkpoints_can_be_written_at_time_intervals(tmp_path: Path) -> None:
    fine_tuned(output_dir=str(tmp_path), checkpoint_every="0.000001s", keep_checkpoints=100)
    assert len(checkpoints_of(tmp_path)) == 16
    fine_tuned(output_dir=str(tmp_path), checkpoint_every=None, keep_checkpoints=100)
    assert checkpoints_of(tmp_path) == ["update-00000007-epoch-0001", "update-00000014-epoch-0002"]


def test_a_checkpoint_describes_its_files_and_its_run(ended: Path) -> None:
    folder = ended / "checkpoints" / "update-00000007-epoch-0001"
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        *listed, "manifest.json",
    }  # fmt: skip
    assert set(listed) == {
        "model/model.safetensors", "model/config.json", "buffers.safetensors", "best.safetensors", "optimizer.pt",
        "processes.pt", "state.json", "ledger.jsonl",
    }  # fmt: skip
    metadata = json.loads((folder / "state.json").read_text())
    assert (metadata["updates"], metadata["epochs"], metadata["rows"]) == (7, 1, 54)
    assert metadata["recipe"]["learning_rate"] == 1e-3
    assert metadata["run_with"]["batch_size"] == 2
    assert (
        len(without_audits(ledger_of(folder))) == 7 + 1 + 2
    )  # updates, an epoch, and the evaluations before and after it


FILES = ("model/model.safetensors", "optimizer.pt", "processes.pt", "state.json", "ledger.jsonl", "manifest.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["truncated", "flipped", "removed"])
def test_damage_is_detected(file: str, how: str, ended: Path, tmp_path: Path) -> None:
    folder = copied(ended, tmp_path) / "checkpoints" / "update-00000012"
    assert damage(folder) is None
    spoil(folder / file, how)
    said = damage(folder)
    assert said is not None
    assert file in said or file == "manifest.json"  # a damaged manifest may list wrong checksums of other files


def spoil(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
        return
    if how == "truncated":
        del content[len(content) // 2 :]
    else:  # one bit of one byte; in the manifest, of a checksum
        content[content.rindex(b'sha256": "') + 12 if path.name == "manifest.json" else len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    ended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(ended, tmp_path)
    newest = folder / "checkpoints" / "update-00000014-epoch-0002"
    spoil(newest / "optimizer.pt", "flipped")
    spoil(folder / "checkpoints" / "update-00000012" / "state.json", "truncated")
    half = folder / "checkpoints" / ".update-00000013.partial"
    half.mkdir()
    (half / "optimizer.pt").write_text("half")
    arguments: dict[str, Any] = {"checkpoint_every": 3, "restore_best_weights": True}
    again = fine_tuned(output_dir=str(folder), resume="auto", **arguments)
    told = capsys.readouterr().err
    assert f"Skipped {newest}, which is damaged: its optimizer.pt has other contents than in its manifest.json." in told
    assert "update-00000012, which is damaged: its state.json has another size" in told
    assert f"Removed {half}, which was not written completely." in told
    assert "Resuming after update 9, from" in told
    assert fine_tuned(**arguments).differences(again) == []
    assert damage(newest) is None  # the resumed run wrote it again
    named_so = [name for name in checkpoints_of(folder) if name.startswith("damaged-")]
    assert named_so == ["damaged-update-00000014-epoch-0002"]  # only one damaged checkpoint is renamed


@pytest.mark.slow
def test_without_an_intact_checkpoint_auto_starts_anew_and_a_path_is_refused(
    ended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(ended, tmp_path)
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
    record = (folder / "run.json").read_text()
    (folder / "run.json").write_text(record.replace('"finished": true', '"finished": false'))
    with pytest.raises(CheckpointError, match="which has no sound checkpoint"):
        fine_tuned(resume=str(folder))
    with pytest.raises(CheckpointError, match=r"update-00000012', which is not a checkpoint .* has no manifest.json"):
        fine_tuned(resume=str(folder / "checkpoints" / "update-00000012"))
    again = fine_tuned(output_dir=str(folder), resume="auto", restore_best_weights=True)
    assert "None of the checkpoints is sound. Starting a new run." in capsys.readouterr().err
    assert fine_tuned(restore_best_weights=True).differences(again) == []


def test_an_untrusted_checkpoint_runs_no_code(ended: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    folder = copied(ended, tmp_path) / "checkpoints" / "update-00000012"
    for file in ("optimizer.pt", "processes.pt"):
        kept = (folder / file).read_bytes()
        torch.save({"optimizer": Hostile()}, folder / file)
        seal(folder)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path != folder / file}
        with pytest.raises(CheckpointError, match="which cannot be read: Weights only load failed"):
            fine_tuned(output_dir=str(tmp_path / "run"), resume=str(folder), restore_best_weights=True)
        kept_at = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path != folder / file}
        assert kept_at == before  # neither the ledger nor another checkpoint changed
        (folder / file).write_bytes(kept)
    assert not (tmp_path / "ran").exists()


Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_loses_no_update_and_no_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = fine_tuned()
    write, times = Snapshot.write, []

    def full(self: Snapshot, folder: Path) -> None:
        times.append(folder)
        write(self, folder)
        if len(times) in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Snapshot, "write", full)
    run = fine_tuned(output_dir=str(tmp_path), checkpoint_every=3, keep_checkpoints=1)
    told = capsys.readouterr().err
    assert whole.differences(run) == []
    for name in ("update-00000006", "update-00000007-epoch-0001"):
        assert re.search(rf"The checkpoint {name} \(.* kB\) could not be written: No space left on device\. Tr", told)
    assert f"the newest checkpoint is {tmp_path / 'checkpoints' / 'update-00000003'}." in told
    assert checkpoints_of(tmp_path)[-1] == "update-00000014-epoch-0002"
    assert all(not path.name.startswith(".") for path in (tmp_path / "checkpoints").iterdir())


@pytest.mark.slow
def test_no_checkpoint_is_written_to_a_disk_without_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10, 5, 5))
    fine_tuned(output_dir=str(tmp_path))
    assert "No space left on device (5 B free). Training continues" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


Moments = namedtuple("Moments", "first second")


class WithAState(torch.optim.SGD):
    """SGD with custom state for each weight and a function in each parameter group."""

    def __init__(self, params: Any, state: Any) -> None:
        super().__init__(params, momentum=0.9)
        self._own = state
        for group in self.param_groups:
            group["decay"] = lambda n: n / 2

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.data *= 1 - group["decay"](0.01)
                self.state[p]["own"] = self._own


@pytest.mark.slow
def test_state_that_cannot_be_loaded_again_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fine_tuned(
        optimizer=lambda groups: WithAState(groups, Moments(torch.ones(2), 3)), output_dir=str(tmp_path),
        checkpoint_every=3,
    )  # fmt: skip
    told = capsys.readouterr().err
    assert run.result.optimizer_steps == 14
    assert told.count("No checkpoint could be made") == 1
    assert "the optimizer's state contains a Moments, which cannot be loaded without running code. Training" in told
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_an_optimizer_with_functions_in_its_param_groups_can_be_resumed(tmp_path: Path) -> None:
    arguments = {"optimizer": lambda groups: WithAState(groups, (torch.ones(2), {"n": 3}))}
    whole = fine_tuned(output_dir=str(tmp_path), checkpoint_every=3, keep_checkpoints=9, **arguments)
    again = fine_tuned(resume=str(tmp_path / "checkpoints" / "update-00000012"), **arguments)
    assert whole.differences(again) == []


@pytest.mark.slow
def test_an_error_while_taking_a_checkpoint_loses_no_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("ftaccum.checkpoint.state.on_host", no_memory)
    run = fine_tuned(output_dir=str(tmp_path), checkpoint_every=3)
    assert "can't allocate memory\")" in capsys.readouterr().err
    assert uninterrupted().differences(run) == []


@pytest.mark.slow
def test_training_continues_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, trained = Snapshot.write, model()
    release, passes = threading.Event(), []

    def slow(self: Snapshot, folder: Path) -> None:
        passes.append(float(trained.n_passes))
        if len(passes) == 1:
            assert release.wait(60)
            passes.append(float(trained.n_passes))
        write(self, folder)

    monkeypatch.setattr(Snapshot, "write", slow)
    trained.register_forward_hook(lambda *_: release.set() if float(trained.n_passes) >= 4 * 5 else None)
    run = fine_tuned(trained, output_dir=str(tmp_path), checkpoint_every=3, keep_checkpoints=9)
    assert passes[1] >= passes[0] + 4
    assert uninterrupted().differences(run) == []
    there = str(tmp_path / "checkpoints" / "update-00000003")  # holds the state at the time when writing began
    assert fine_tuned(resume=there).differences(run) == []


@pytest.mark.slow
def test_without_memory_for_a_copy_training_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, trained, passes = Snapshot.write, model(), []

    def slow(self: Snapshot, folder: Path) -> None:
        before = float(trained.n_passes)
        time.sleep(0.2)  # for passes of a run that does not wait
        write(self, folder)
        passes.append(float(trained.n_passes) - before)

    monkeypatch.setattr(Snapshot, "write", slow)
    # Only the checkpoints lack memory. Without it, an audit would have another reference than in `uninterrupted`.
    monkeypatch.setattr("ftaccum.checkpoint.writer.free_on_host", lambda: 10)
    run = fine_tuned(trained, output_dir=str(tmp_path), checkpoint_every=3, keep_checkpoints=9)
    assert passes == [0] * 6
    assert uninterrupted().differences(run) == []
    for name in ("update-00000003", "update-00000012"):
        assert fine_tuned(resume=str(tmp_path / "checkpoints" / name)).differences(run) == []


def test_checkpoints_are_ordered_by_update(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path)
    places = [directory.place(n, epoch) for n, epoch in ((2, None), (10, None), (10, 1), (123456789, 2))]
    for place in reversed(places):
        place.mkdir(parents=True)
    (directory.folder / "notes").mkdir()
    assert directory.checkpoints() == list(reversed(places))
    directory.prune(1, best=10)
    assert directory.checkpoints() == [places[3], places[2]]


def test_the_folder_of_another_run_is_not_changed(
    ended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damaged and incomplete checkpoints in the folder of another run stay there too."""
    folder = copied(ended, tmp_path)
    spoil(folder / "checkpoints" / "update-00000014-epoch-0002" / "optimizer.pt", "flipped")
    (folder / "checkpoints" / ".update-00000013.partial").mkdir()
    before = checkpoints_of(folder)
    fine_tuned(output_dir=str(tmp_path / "own"), resume=str(folder), restore_best_weights=True)
    assert checkpoints_of(folder) == before
    assert "is damaged" in capsys.readouterr().err

    newest, read = folder / "checkpoints" / "update-00000012", Path.open

    def stale(self: Path, *arguments: Any, **more: Any) -> Any:
        if self.name == "optimizer.pt" and self.parent == newest:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", stale)
    assert CheckpointDirectory(folder / "checkpoints").newest_sound()[1] == [
        folder / "checkpoints" / "update-00000014-epoch-0002"
    ]
    assert f"Skipped {newest}, which cannot be read: [Errno {errno.ESTALE}] Stale file handle" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("spelling", ["absolute", "a link to the folder", "a link to the checkpoint"])
def test_a_runs_own_checkpoint_is_recognised_under_any_path(
    spelling: str, ended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(ended, tmp_path)
    behind = folder / "checkpoints" / "update-00000009"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked").symlink_to(folder if spelling == "a link to the folder" else behind)
    named = {
        "absolute": behind,
        "a link to the folder": Path("linked", "checkpoints", behind.name),
        "a link to the checkpoint": Path("linked"),
    }[spelling]
    CheckpointDirectory(Path("run", "checkpoints")).set_aside(named, ())
    assert checkpoints_of(folder) == [f"update-{n:08d}" for n in (3, 6)] + ["update-00000007-epoch-0001", behind.name]
    aside = sorted(path.name for path in (folder / "checkpoints.previous").iterdir())
    assert aside == ["update-00000012", "update-00000014-epoch-0002"]


@pytest.mark.slow
def test_a_run_can_resume_from_a_checkpoint_that_was_set_aside(ended: Path, tmp_path: Path) -> None:
    folder = copied(ended, tmp_path)
    arguments: dict[str, Any] = {
        "output_dir": str(folder), "checkpoint_every": 3, "keep_checkpoints": 9, "restore_best_weights": True,
    }  # fmt: skip
    whole = fine_tuned(**arguments)
    behind = folder / "checkpoints.previous" / "update-00000012"
    again = fine_tuned(**arguments, resume=str(behind))
    assert whole.differences(again) == []
    assert damage(behind) is None
    assert (folder / "checkpoints.previous-2").is_dir()
    CheckpointDirectory(folder / "checkpoints").clear()
    assert not list(folder.glob("checkpoints*"))


def test_unrelated_folders_are_not_touched(ended: Path, tmp_path: Path) -> None:
    folder = copied(ended, tmp_path) / "checkpoints"
    for name in (".ipynb_checkpoints", ".mine.partial", ".update-00000013.partial", ".update-00000012.gone"):
        (folder / name).mkdir()
    CheckpointDirectory(folder).set_aside(None, ())
    assert checkpoints_of(folder.parent) == [".ipynb_checkpoints", ".mine.partial"]


def of_another_version(folder: Path, what: str) -> None:
    if what == "no files":
        (folder / "manifest.json").write_text('{"files": {}}')
        return
    file = folder / ("ledger.jsonl" if what == "fields" else "state.json")
    said = {"fields": ('"window"', '"hue": 1, "window"'), "format": (f'"format": {FORMAT}', '"format": 1')}[what]
    file.write_text(file.read_text().replace(*said))
    seal(folder)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no files", "its manifest.json does not list buffers.safetensors"),
        ("fields", r"unknown names \['hue'\]. Another version of ftaccum may have written it"),
        ("format", f"its format is 1 instead of {FORMAT}"),
    ],
)
def test_a_checkpoint_of_another_version_is_refused(what: str, said: str, ended: Path, tmp_path: Path) -> None:
    folder = copied(ended, tmp_path) / "checkpoints" / "update-00000012"
    of_another_version(folder, what)
    with pytest.raises(CheckpointError, match=said):
        fine_tuned(resume=str(folder), restore_best_weights=True)


HOLDS = "import sys, time; from ftaccum.runtime.run_dir import RunDir\n" + (
    "with RunDir.resolve(sys.argv[1]).lock(): print('held', flush=True); time.sleep(600)"
)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of files")
@pytest.mark.slow
def test_only_one_run_at_a_time_uses_a_folder(tmp_path: Path) -> None:
    fine_tuned(output_dir=str(tmp_path), checkpoint_every=3)
    before, ledger = checkpoints_of(tmp_path), (tmp_path / "ledger.jsonl").read_text()
    assert not (tmp_path / ".lock").exists()
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(
                CheckpointError, match=rf"another run is using it \(process {other.pid} on .*\), and two"
            ):
                fine_tuned(output_dir=str(tmp_path))
        finally:
            other.send_signal(signal.SIGKILL)
    assert checkpoints_of(tmp_path) == before
    assert (tmp_path / "ledger.jsonl").read_text() == ledger
    assert (tmp_path / ".lock").exists()  # a killed process leaves the file, but no lock on it
    for _ in range(2):
        fine_tuned(output_dir=str(tmp_path))
    assert not (tmp_path / ".lock").exists()
