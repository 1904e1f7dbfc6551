"""The part of a sharded model's state that one process saves: taken from the run, and written."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..runtime.atomic_files import atomic_write, fsync_path
from ..runtime.sharding.layout import Layout
from .serialization import map_tensors, n_bytes_in, on_host
from .shard_index import ShardEntry, ShardIndex, shard_files

REFERENCE = "ftaccum.shard"  # in place of a tensor: the key of a dict whose value is the tensor's name in the shards


@dataclass(frozen=True)
class Shard:
    """A copy of one process's tensors in host memory, which the run no longer changes."""

    index: ShardIndex
    tensors: dict[str, Tensor]

    @property
    def n_bytes(self) -> int:
        """Approximate size on disk."""
        return n_bytes_in(self.tensors) + 200 * len(self.index.entries)

    def write(self, folder: Path) -> None:
        """Write the shard into the folder of a checkpoint. The index comes last: if it is there, the shard is whole.

        Raises:
            OSError: if the disk is full or the folder is missing, among other causes.
        """
        tensors, index = (folder / name for name in shard_files(self.index.process))
        save_file(_with_own_memory(self.tensors), tensors, metadata={"checkpoint": self.index.checkpoint})
        fsync_path(tensors)
        with atomic_write(index) as partial:
            partial.write_text(self.index.as_json())


class ShardTaker:
    """Takes a process's parts of tensors one after the other.

    All processes take the same tensors in the same order. Those that are not sharded are equal on all of them, and only
    the main process saves them.
    """

    def __init__(self, checkpoint: str, process: int, processes: int) -> None:
        self._index = ShardIndex(checkpoint, process, processes, {})
        self._tensors: dict[str, Tensor] = {}

    def take(self, section: str, tensors: Mapping[str, Tensor], *, copy: bool) -> None:
        """Take the own parts of tensors, by name.

        Args:
            section: what these tensors are; a prefix of their names.
            copy: whether to copy tensors that are in host memory already.
        """
        for name, tensor in tensors.items():
            self._take(f"{section}/{name}", tensor, copy)

    def take_parts(self, section: str, parts: Mapping[str, Tensor], likes: Mapping[str, Tensor]) -> None:
        """Take parts that are in host memory already, of tensors with the layouts of others."""
        for name, part in parts.items():
            self._add(f"{section}/{name}", likes[name], part)

    def take_nested(self, section: str, value: Any, *, copy: bool) -> Any:
        """Take the sharded tensors of a nested value, and return it with references in their place."""

        def replaced(tensor: Tensor, path: str) -> Any:
            if not isinstance(tensor, DTensor):
                return tensor
            name = f"{section}/{path}"
            while name in self._index.entries:  # paths are texts: 1 and "1" are the same
                name += "'"
            self._take(name, tensor, copy)
            return {REFERENCE: name}

        return map_tensors(value, replaced)

    def shard(self) -> Shard:
        """Return everything taken so far."""
        return Shard(self._index, self._tensors)

    def _take(self, name: str, tensor: Tensor, copy: bool) -> None:
        if isinstance(tensor, DTensor):
            self._add(name, tensor, on_host(tensor.to_local(), copy))
        elif not self._index.process:
            self._add(name, tensor, on_host(tensor, copy))

    def _add(self, name: str, like: Tensor, part: Tensor) -> None:
        shape, dtype = tuple(like.shape), str(part.dtype).removeprefix("torch.")
        if isinstance(like, DTensor):
            layout = Layout.of(like)
            offset, local = layout.local_box()
            self._index.entries[name] = ShardEntry(shape, dtype, offset, local, layout.sharded_dims)
        elif not self._index.process:
            self._index.entries[name] = ShardEntry(shape, dtype, (0,) * len(shape), shape, None)
        else:
            return
        if part.numel():
            self._tensors[name] = part


def _with_own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with separate memory, which safetensors requires: copies of those that share that of another."""
    known: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if address in known else tensor
        known.add(address)
    return found
