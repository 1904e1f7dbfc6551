"""Files and folders are replaced completely or not at all: an error, a kill or a full disk keeps the old ones."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ftaccum.runtime import atomic_files as files
from ftaccum.runtime.atomic_files import atomic_directory, atomic_write, fsync_path


def tree(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in sorted(folder.rglob("*")) if f.is_file()}


def write_folder(path: Path, text: str) -> None:
    with atomic_directory(path) as folder:
        (folder / "deep").mkdir()
        (folder / "a").write_text(text)
        (folder / "deep" / "b").write_text(text)


def test_a_file_is_not_replaced_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there" / "r.json"
    with atomic_write(path) as beside:
        beside.write_text("old")
        assert not path.exists()
    with atomic_write(str(path)) as beside:
        assert beside.parent == path.parent
        assert not beside.exists()
        beside.write_text("new")
        assert path.read_text() == "old"
    assert tree(tmp_path) == {"not/there/r.json": "new"}


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_with_all_its_contents(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    path = tmp_path / "model"
    write_folder(path, "old")
    (path / "shard").write_text("of the old one")
    write_folder(path, "new")
    assert tree(tmp_path) == {"model/a": "new", "model/deep/b": "new"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no exchange")
def test_folders_are_exchanged_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_two_steps(beside: Path, target: Path) -> None:
        raise AssertionError(f"{beside} took the place of {target} in two steps")

    write_folder(tmp_path / "model", "old")
    monkeypatch.setattr(files, "_put_in_place", in_two_steps)
    write_folder(tmp_path / "model", "new")
    assert tree(tmp_path) == {"model/a": "new", "model/deep/b": "new"}


def test_an_error_during_a_write_leaves_only_the_old_files(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("old")
    write_folder(tmp_path / "model", "old")
    before = tree(tmp_path)

    def fail(path: Path) -> None:
        path.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "r.json") as beside:
        fail(beside)
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "model") as folder:
        fail(folder / "a")
    assert tree(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "r.json"]


def test_the_old_folder_remains_if_the_new_one_cannot_be_moved_into_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, target: Path) -> None:
        if path.name.endswith(".partial"):
            raise OSError(errno.EIO, "no")
        os.rename(path, target)

    write_folder(tmp_path / "model", "old")
    monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="no"):
        write_folder(tmp_path / "model", "new")
    assert tree(tmp_path) == {"model/a": "old", "model/deep/b": "old"}


def test_files_that_fail_to_flush_do_not_replace_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems report a full disk only when they flush."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "r.json").write_text("old")
    write_folder(tmp_path / "model", "old")
    before = tree(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), atomic_write(tmp_path / "r.json") as beside:
        beside.write_text("new")
    with pytest.raises(OSError, match="No space left"):
        write_folder(tmp_path / "model", "new")
    assert tree(tmp_path) == before


def test_files_and_folders_are_flushed_before_they_are_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    write_folder(tmp_path / "model", "new")
    beside = ".model.partial"
    assert sorted(order[:-1]) == sorted(["a", "b", "deep", beside])
    assert order.index("b") < order.index("deep") < order.index(beside)
    assert order[-1] == tmp_path.name  # the folder whose entries the rename changed


def test_files_are_written_to_a_file_system_that_cannot_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", cannot)
    fsync_path(tmp_path)
    write_folder(tmp_path / "model", "new")
    assert tree(tmp_path) == {"model/a": "new", "model/deep/b": "new"}


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "large disk")
    write_folder(tmp_path / "model", "new")
    assert (tmp_path / "model").is_symlink()
    assert tree(tmp_path / "large disk") == {"a": "new", "deep/b": "new"}


def test_partial_files_of_a_killed_process_are_removed_by_the_next(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", "old")
    killed_in_the_middle = (
        "import os, signal; from ftaccum.runtime.atomic_files import atomic_directory, atomic_write\n"
        f"with (atomic_directory({str(tmp_path / 'model')!r}) as folder,\n"
        f"      atomic_write({str(tmp_path / 'r')!r}) as file):\n"
        "    (folder / 'x').write_text('half'); file.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", killed_in_the_middle]).returncode == -signal.SIGKILL
    assert tree(tmp_path / "model") == {"a": "old", "deep/b": "old"}
    assert not (tmp_path / "r").exists()
    write_folder(tmp_path / "model", "new")
    with atomic_write(tmp_path / "r") as beside:
        beside.write_text("whole")
    assert tree(tmp_path) == {"model/a": "new", "model/deep/b": "new", "r": "whole"}
