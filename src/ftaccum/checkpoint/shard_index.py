"""The index of a shard: the parts of tensors that one process has saved."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = "shards"


def shard_files(process: int) -> tuple[str, str]:
    """Return the paths of a process's tensors and of their index, in the folder of a checkpoint."""
    return f"{FOLDER}/{process}.safetensors", f"{FOLDER}/{process}.json"


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor.

    Attributes:
        offset: where it begins, along each dimension.
        shape: its own shape.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Box":
        """Return the box that holds all of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def _end(self) -> tuple[int, ...]:
        return tuple(first + n for first, n in zip(self.offset, self.shape, strict=True))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def overlap(self, other: "Box") -> "Box":
        """Return the part that both boxes hold, which may be empty."""
        first = tuple(map(max, self.offset, other.offset))
        ends = map(min, self._end, other._end)
        return Box(first, tuple(max(0, end - begin) for begin, end in zip(first, ends, strict=True)))

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """Return the slices that select this box from the tensor of a box around it."""
        begins = [a - b for a, b in zip(self.offset, outer.offset, strict=True)]
        return tuple(slice(begin, begin + n) for begin, n in zip(begins, self.shape, strict=True))


@dataclass(frozen=True)
class ShardEntry:
    """A process's part of one tensor.

    Attributes:
        shape: the shape of the whole tensor.
        dtype: its type, as safetensors names it in torch ("float32").
        offset, local: where the part begins in the whole tensor, and its shape.
        sharded_dims: for each dimension of the mesh of processes, the dimension of the tensor that was split over it;
            None for copies. None if the tensor was not shared between processes.
    """

    shape: tuple[int, ...]
    dtype: str
    offset: tuple[int, ...]
    local: tuple[int, ...]
    sharded_dims: tuple[int | None, ...] | None

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> "ShardEntry":
        dims = found["sharded_dims"]
        shape, offset, local = (tuple(found[name]) for name in ("shape", "offset", "local"))
        return cls(shape, found["dtype"], offset, local, None if dims is None else tuple(dims))

    @property
    def box(self) -> Box:
        return Box(self.offset, self.local)


@dataclass(frozen=True)
class ShardIndex:
    """The index of the tensors in a process's shard.

    Attributes:
        checkpoint: a random name of the checkpoint, the same in all its shards.
        process, processes: the index of the process, and their number.
        entries: the parts, by name of the tensor. Empty parts have an entry, but no tensor in the file.
    """

    checkpoint: str
    process: int
    processes: int
    entries: dict[str, ShardEntry]

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> "ShardIndex":
        """Read an index.

        Raises:
            OSError, ValueError, TypeError, KeyError: if the file is missing or is not an index.
        """
        found = json.loads(path.read_text())
        entries = {name: ShardEntry.of_json(entry) for name, entry in found.pop("entries").items()}
        return cls(entries=entries, **found)


def read_indices(folder: Path) -> list[ShardIndex]:
    """Return the indices of all shards of a checkpoint.

    Raises:
        OSError, ValueError, TypeError, KeyError: if a shard is missing, or belongs to another checkpoint.
    """
    first = ShardIndex.read(folder / shard_files(0)[1])
    found = [ShardIndex.read(folder / shard_files(process)[1]) for process in range(first.processes)]
    for process, index in enumerate(found):
        if (index.checkpoint, index.process, index.processes) != (first.checkpoint, process, first.processes):
            raise ValueError(f"its {shard_files(process)[1]} belongs to another checkpoint")
    return found
