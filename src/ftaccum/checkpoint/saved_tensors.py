"""Read the tensors of a checkpoint, whole or only the part that this process holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..runtime.sharding.layout import Layout
from .best_weights import assign
from .manifest import BESIDE, BEST, BUFFERS, WEIGHTS
from .shard_index import Box, read_indices, shard_files

_WHOLE = {"model": WEIGHTS, "buffers": BUFFERS, "beside": BESIDE, "best": BEST}  # the file of each section


@dataclass
class SavedTensor:
    """A tensor in a checkpoint.

    Attributes:
        shape: its shape.
        dtype: its type; None if the file of its only part tells it.
        parts: the files that hold its parts, the name in each, and which part that is.
        sharded_dims: how it was shared between processes, see `ShardEntry`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    parts: dict[Box, tuple[Any, str]] = field(default_factory=dict)
    sharded_dims: tuple[int | None, ...] | None = None

    def read(self, box: Box | None = None) -> Tensor:
        """Return the tensor, or the part in a box, in host memory. Nothing else is read.

        Raises:
            ValueError: if the checkpoint has only some of it.
        """
        wanted = Box.whole(self.shape) if box is None else box
        overlaps = {part: part.overlap(wanted) for part in self.parts}
        overlaps = {part: overlap for part, overlap in overlaps.items() if overlap.numel}
        if sum(overlap.numel for overlap in overlaps.values()) != wanted.numel:
            raise ValueError(f"its shards do not have all of a tensor of shape {list(self.shape)}")
        read = [(overlap, self._slice(part, overlap)) for part, overlap in overlaps.items()]
        if len(read) == 1:
            return read[0][1]
        whole = torch.empty(wanted.shape, dtype=self.dtype or self._dtype_in_file())
        for overlap, values in read:
            whole[overlap.within(wanted)] = values
        return whole

    def read_as(self, like: Tensor) -> Tensor:
        """Return the part of the tensor that this process holds of a tensor of the same shape."""
        return self.read(Box(*Layout.of(like).local_box()) if isinstance(like, DTensor) else None)

    def _dtype_in_file(self) -> torch.dtype:
        file, name = next(iter(self.parts.values()))
        dtype: torch.dtype = file.get_slice(name)[:0].dtype
        return dtype

    def _slice(self, part: Box, wanted: Box) -> Tensor:
        file, name = self.parts[part]
        found: Tensor
        found = file.get_tensor(name) if part == wanted else file.get_slice(name)[wanted.within(part)]
        return found


class SavedTensors:
    """The tensors of a checkpoint by section and name: of one in whole files, or of one in shards."""

    def __init__(self, folder: Path) -> None:
        """Args:
        folder: the folder of a checkpoint.
        """
        self._folder = folder

    def section(self, section: str) -> dict[str, SavedTensor]:
        """Return the tensors of a section ("model", "buffers", "beside", "best"), by name. It may be empty.

        Raises:
            OSError, ValueError, TypeError, KeyError, SafetensorError: if files are missing or cannot be read.
        """
        if not self._is_sharded:
            path = self._folder / _WHOLE[section]
            return _in_file(path) if path.exists() else {}
        prefix = f"{section}/"
        return {name.removeprefix(prefix): t for name, t in self.sharded.items() if name.startswith(prefix)}

    @cached_property
    def sharded(self) -> Mapping[str, SavedTensor]:
        """The tensors in shards, by the name there."""
        found: dict[str, SavedTensor] = {}
        for index in read_indices(self._folder) if self._is_sharded else []:
            name_of_file = shard_files(index.process)[0]
            file = safe_open(self._folder / name_of_file, "pt")
            if (file.metadata() or {}).get("checkpoint") != index.checkpoint:
                raise ValueError(f"its {name_of_file} belongs to another checkpoint")
            for name, entry in index.entries.items():
                dtype = getattr(torch, entry.dtype)
                saved = found.setdefault(name, SavedTensor(entry.shape, dtype, {}, entry.sharded_dims))
                if (entry.shape, dtype) != (saved.shape, saved.dtype):
                    raise ValueError(f"its shards have {name!r} in several shapes or types")
                if entry.box.numel:  # an empty part is not in the file
                    saved.parts.setdefault(entry.box, (file, name))
        return found

    @property
    def _is_sharded(self) -> bool:
        return (self._folder / shard_files(0)[1]).exists()


def load(own: Mapping[str, Tensor], saved: Mapping[str, SavedTensor], *, strict: bool = True) -> None:
    """Copy saved values into tensors of the same names. Unless `strict`, skip tensors whose saved shape differs.

    Raises:
        KeyError, ValueError: if it is strict and a tensor is missing or has another shape.
    """
    for name, tensor in own.items():
        if not strict and (name not in saved or saved[name].shape != tuple(tensor.shape)):
            continue
        if saved[name].shape != tuple(tensor.shape):
            raise ValueError(f"its {name!r} has the shape {list(saved[name].shape)} instead of {list(tensor.shape)}")
        assign(tensor, saved[name].read_as(tensor))


def local_parts(own: Mapping[str, Tensor], saved: Mapping[str, SavedTensor]) -> dict[str, Tensor]:
    """Return the saved values of tensors of the same names: of sharded ones, this process's part."""
    return {name: saved[name].read_as(tensor).clone() for name, tensor in own.items()}  # the file may be removed


def _in_file(path: Path) -> dict[str, SavedTensor]:
    file = safe_open(path, "pt")
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return {name: SavedTensor(shape, None, {Box.whole(shape): (file, name)}) for name, shape in shapes.items()}
