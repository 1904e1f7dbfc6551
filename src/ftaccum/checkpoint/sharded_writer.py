"""The writer of checkpoints in shards: each process writes its own, and the main process seals them."""

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runtime.atomic_files import atomic_directory
from ..runtime.host import free_on_host
from ..runtime.process_group import ProcessGroup
from .directory import CheckpointDirectory
from .format import Snapshot
from .manifest import seal
from .shard_index import read_indices, shard_files
from .shards import Shard
from .writer import ROOM, CheckpointWriter, check_disk, reason

_SECONDS_TO_SEE = 30.0  # a network disk may show files of another machine late
_SECONDS_AT_END = 2.0  # when a run ends with an error, and the other processes may be gone


class _UnsealedError(Exception):
    """Not all parts of a checkpoint are there."""


class ShardedWriter(CheckpointWriter):
    """The writer of all processes' shards, each in a thread of its process.

    The threads never communicate. Each process tells the others whether it still writes, and whether that failed, in
    the message that the processes exchange after every update anyway. Once nobody writes, the thread of the main
    process seals the checkpoint or removes it. If a process is lost or an error ends the run, nobody can be asked: then
    the files of finished shards decide.
    """

    def __init__(
        self, directory: CheckpointDirectory, keep: int, last: Path | None, process_group: ProcessGroup
    ) -> None:
        super().__init__(directory, keep, last)
        self._process_group = process_group
        self._begun = False  # whether a checkpoint waits for its end
        self._reset()

    def _reset(self) -> None:
        self._written = threading.Event()  # this process's part, successfully or not
        self._fault: str | None = None
        # Of the main process: the name of the folder, or None if it cannot be made; a fault, and seconds to wait for
        # files.
        self._folder: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._verdict: queue.SimpleQueue[tuple[str | None, float]] = queue.SimpleQueue()

    def has_room(self, n_bytes: int) -> bool:
        """Return whether host memory has room for copies of all processes' parts. All must call this together."""
        host = socket.gethostname()
        sizes = self._process_group.gather((host, n_bytes))
        here = sum(size for name, size in sizes if name == host)
        return not self._process_group.any(here * ROOM >= free_on_host())

    def write(self, snapshot: Snapshot | Shard, place: Path, best: int | None) -> None:
        """Begin to write a checkpoint. All processes must call this together, with the previous one finished."""
        self._reset()
        n_bytes = sum(self._process_group.gather(snapshot.n_bytes))
        if isinstance(snapshot, Snapshot):
            self._start(lambda: self._write_and_seal(snapshot, place, best, n_bytes))
        name = self._folder.get() if self._process_group.is_main else None
        self._begun = name is not None  # so that `close` ends it if another process is lost now
        name = self._process_group.broadcast(name)
        self._begun = name is not None  # otherwise, the main process has logged why
        if self._begun and isinstance(snapshot, Shard):
            self._start(lambda: self._write_part(snapshot, place.with_name(name)))

    def release(self) -> None:
        """Wait until this process's part is written, so that the run may change the tensors in it."""
        if self._begun:
            self._written.wait()

    def status(self) -> list[bool]:
        return [self._begun and not self._written.is_set(), self._begun and self._fault is not None]

    def advance(self, *, busy: bool, failed: bool) -> None:
        """Have the main process seal the checkpoint once nobody writes. All processes must call this together."""
        if not self._begun or busy:
            return
        faults = self._process_group.gather(self._fault) if failed else []
        said = [f"process {index}: {fault}" for index, fault in enumerate(faults) if fault]
        self._end("; ".join(said) or None, _SECONDS_TO_SEE)

    def finish(self) -> None:
        """Wait until the current checkpoint is sealed. All processes must call this together."""
        if self._begun:
            self.release()
            busy, failed = self._process_group.any_of(self.status())
            self.advance(busy=busy, failed=failed)
        super().finish()

    def close(self) -> None:
        """Wait for the own part. The main process seals the checkpoint if it finds those of all processes."""
        if self._begun:
            self.release()
            self._end(self._fault, _SECONDS_AT_END)
        super().finish()

    def _start(self, target: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=target, daemon=True)
        self._thread.start()

    def _end(self, fault: str | None, seconds: float) -> None:
        self._begun = False
        if self._process_group.is_main:
            self._verdict.put((fault, seconds))

    def _write_part(self, shard: Shard, folder: Path) -> None:
        with self._writing():
            shard.write(folder)

    def _write_and_seal(self, snapshot: Snapshot, place: Path, best: int | None, n_bytes: int) -> None:
        """Write the main process's files, and seal the checkpoint when the others have written theirs."""
        try:
            check_disk(place, n_bytes)
            with atomic_directory(place) as folder:
                (folder / shard_files(0)[0]).parent.mkdir()
                self._folder.put(folder.name)
                with self._writing():
                    snapshot.write(folder)
                fault, seconds = self._verdict.get()
                if fault is not None:
                    raise _UnsealedError(fault)
                _wait_for_shards(folder, seconds)
                seal(folder, self._process_group.size)
            self._put_in_place(place, best)
        except Exception as error:
            self._warn(place, n_bytes, str(error) if isinstance(error, _UnsealedError) else reason(error))
            self._folder.put(None)  # nobody reads this if the folder could be made

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Remember how it ends that this process writes its part."""
        try:
            yield
        except Exception as error:
            self._fault = reason(error)
        finally:
            self._written.set()


def _wait_for_shards(folder: Path, seconds: float) -> None:
    """Wait until the shards of all processes can be read.

    Raises:
        _UnsealedError: if they cannot after these seconds.
    """
    last = time.monotonic() + seconds
    while True:
        try:
            indices = read_indices(folder)
            for index in indices:
                (folder / shard_files(index.process)[0]).stat()
            return
        except FileNotFoundError as error:
            if time.monotonic() > last:
                raise _UnsealedError(
                    f"the main process does not find {Path(str(error.filename)).name}, which another process was to "
                    "write. Put `output_dir` on a disk that all machines share"
                ) from error
        time.sleep(0.05)
