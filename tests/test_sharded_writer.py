"""Checkpoints that several processes write together. The processes are threads here."""

import errno
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ftaccum.checkpoint.directory import CheckpointDirectory
from ftaccum.checkpoint.format import Snapshot
from ftaccum.checkpoint.manifest import damage
from ftaccum.checkpoint.shard_index import ShardEntry, ShardIndex
from ftaccum.checkpoint.sharded_writer import ShardedWriter
from ftaccum.checkpoint.shards import Shard

SIZE = 2


class Threads:
    """The part of a process group that a writer uses, for one thread of several."""

    size = SIZE

    def __init__(self, index: int, barrier: threading.Barrier, values: list[Any]) -> None:
        self.index, self.is_main = index, index == 0
        self._barrier, self._values = barrier, values

    def gather(self, value: Any) -> list[Any]:
        self._values[self.index] = value
        self._barrier.wait(10)
        found = list(self._values)
        self._barrier.wait(10)
        return found

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]

    def any_of(self, flags: Iterable[bool]) -> list[bool]:
        return [any(each) for each in zip(*self.gather(list(flags)), strict=True)]

    def any(self, flag: bool) -> bool:
        return self.any_of([flag])[0]


def in_threads(function: Callable[[int, Threads], Any]) -> list[Any]:
    """Call a function in a thread for each process, and return the results."""
    barrier, values = threading.Barrier(SIZE), [None] * SIZE
    with ThreadPoolExecutor(SIZE) as pool:
        groups = [Threads(index, barrier, values) for index in range(SIZE)]
        return [future.result() for future in [pool.submit(function, group.index, group) for group in groups]]


def snapshot_of(index: int, checkpoint: str = "a", shard_class: type[Shard] = Shard) -> Snapshot | Shard:
    entry = ShardEntry((4,), "float32", (2 * index,), (2,), (0,))
    shard = shard_class(ShardIndex(checkpoint, index, SIZE, {"model/w": entry}), {"model/w": torch.ones(2)})
    return shard if index else Snapshot({}, [], shard, {}, [])


class Failing(Shard):
    """A shard for which the disk has no room."""

    def write(self, folder: Path) -> None:
        (folder / "shards" / f"{self.index.process}.safetensors").write_text("part")
        raise OSError(errno.ENOSPC, "No space left on device")


class Slow(Shard):
    """A shard that is written after a moment."""

    def write(self, folder: Path) -> None:
        time.sleep(0.2)
        super().write(folder)


class Lost(Shard):
    """A shard of a process that is gone before it writes."""

    def write(self, folder: Path) -> None:
        pass


def writer_of(folder: Path, group: Any) -> ShardedWriter:
    return ShardedWriter(CheckpointDirectory(folder), 2, None, group)


def updated(writer: ShardedWriter, group: Threads) -> list[bool]:
    """Let a process tell its status, as after an update, and return what all agree on."""
    agreed = group.any_of(writer.status())
    writer.advance(busy=agreed[0], failed=agreed[1])
    return agreed


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of the warnings, which grows."""
    found: list[str] = []
    monkeypatch.setattr("ftaccum.runtime.log.logger.warning", found.append)
    return found


def test_a_checkpoint_is_sealed_once_all_have_written(tmp_path: Path) -> None:
    place = tmp_path / "update-00000003"

    def run(index: int, group: Threads) -> list[list[bool]]:
        writer = writer_of(tmp_path, group)
        writer.write(snapshot_of(index, shard_class=Slow if index else Shard), place, None)
        found = [updated(writer, group)]
        assert not place.exists()
        while updated(writer, group)[0]:
            time.sleep(0.01)
        found.append(updated(writer, group))
        writer.finish()
        group.any(False)
        assert damage(place) is None
        assert writer.last == (None if index else place)
        return found

    assert in_threads(run) == [[[True, False], [False, False]]] * 2
    assert [path.name for path in tmp_path.iterdir()] == [place.name]
    assert sorted(path.name for path in (place / "shards").iterdir()) == [
        "0.json", "0.safetensors", "1.json", "1.safetensors"
    ]  # fmt: skip


@pytest.mark.parametrize("failing", [0, 1])
def test_a_checkpoint_that_one_process_cannot_write_is_removed_and_the_next_one_is_written(
    failing: int, tmp_path: Path, warned: list[str]
) -> None:
    first, second = tmp_path / "update-00000003", tmp_path / "update-00000006"

    def run(index: int, group: Threads) -> None:
        writer = writer_of(tmp_path, group)
        writer.write(snapshot_of(index, shard_class=Failing if index == failing else Shard), first, None)
        writer.finish()
        group.any(False)
        assert list(tmp_path.iterdir()) == []
        writer.write(snapshot_of(index, "b"), second, None)
        writer.finish()
        assert writer.last == (None if index else second)

    in_threads(run)
    assert damage(second) is None
    (said,) = warned
    assert said.startswith("The checkpoint update-00000003 (416 B) could not be written: ")
    assert f": process {failing}: No space left on device. Training continues" in said


def test_without_room_on_the_disk_nobody_writes(
    tmp_path: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    total = 2 * (8 + 200)  # of both processes; each alone would have room
    usage = type("Usage", (), {"free": total - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)

    def run(index: int, group: Threads) -> None:
        writer = writer_of(tmp_path, group)
        writer.write(snapshot_of(index), tmp_path / "update-00000003", None)
        assert writer.status() == [False, False]
        writer.finish()

    in_threads(run)
    assert list(tmp_path.iterdir()) == []
    assert "could not be written: No space left on device (415 B free)" in warned[-1]
    usage.free = total
    in_threads(run_again(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["update-00000006"]


def run_again(folder: Path) -> Callable[[int, Threads], None]:
    def run(index: int, group: Threads) -> None:
        writer = writer_of(folder, group)
        writer.write(snapshot_of(index), folder / "update-00000006", None)
        writer.finish()

    return run


def test_all_copies_on_a_host_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 1000
    monkeypatch.setattr("ftaccum.checkpoint.sharded_writer.free_on_host", lambda: free)

    def fits(n_bytes: int) -> list[bool]:
        return in_threads(lambda index, group: writer_of(tmp_path, group).has_room(n_bytes + index))

    assert fits(410) == [True, True]
    assert fits(420) == [False, False]


def test_when_an_error_ends_the_run_the_files_decide(
    tmp_path: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process may be gone, so that nobody can ask it."""
    monkeypatch.setattr("ftaccum.checkpoint.sharded_writer._SECONDS_AT_END", 0.2)

    def run(lost: bool, place: Path) -> None:
        def of_process(index: int, group: Threads) -> None:
            writer = writer_of(tmp_path, group)
            writer.write(snapshot_of(index, shard_class=Lost if index and lost else Shard), place, None)
            if index == 0:
                writer.close()
            elif not lost:
                writer.release()

        in_threads(of_process)

    started = time.monotonic()
    run(lost=False, place=tmp_path / "update-00000003")
    assert damage(tmp_path / "update-00000003") is None
    run(lost=True, place=tmp_path / "update-00000006")
    assert time.monotonic() - started < 3
    assert [path.name for path in tmp_path.iterdir()] == ["update-00000003"]
    assert "the main process does not find 1.json, which another process was to write" in warned[-1]


@pytest.mark.parametrize("free", [0, 1000])
def test_a_process_that_is_lost_before_it_knows_the_folder_is_not_waited_for(
    free: int, tmp_path: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bereft(Threads):
        def gather(self, value: Any) -> list[Any]:
            return [value] * SIZE

        def broadcast(self, value: Any) -> Any:  # noqa: ARG002
            raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("ftaccum.checkpoint.sharded_writer._SECONDS_AT_END", 0.2)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free}))
    writer = writer_of(tmp_path, Bereft(0, threading.Barrier(1), []))
    with pytest.raises(RuntimeError, match="closed by peer"):
        writer.write(snapshot_of(0), tmp_path / "update-00000003", None)
    closing = threading.Thread(target=writer.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
    assert list(tmp_path.iterdir()) == []
    assert ("does not find" if free else "No space left") in warned[-1]


def test_shards_of_two_checkpoints_are_not_sealed_together(tmp_path: Path, warned: list[str]) -> None:
    def run(index: int, group: Threads) -> None:
        writer = writer_of(tmp_path, group)
        writer.write(snapshot_of(index, "ab"[index]), tmp_path / "update-00000003", None)
        writer.finish()

    in_threads(run)
    assert list(tmp_path.iterdir()) == []
    assert "its shards/1.json belongs to another checkpoint" in warned[-1]
