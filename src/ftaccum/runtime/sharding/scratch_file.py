"""Tensors in a temporary file instead of memory."""

import math
import mmap
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes; a tensor must start at a multiple of the size of its numbers


class ScratchFile:
    """A file without a name, to which tensors are written one after the other and then mapped into memory.

    The system reads mapped tensors from the disk when they are used, and can drop them from memory at any time. It
    frees the disk space when nothing uses the file any more, also if the process is killed.
    """

    def __init__(self, folder: Path) -> None:
        """Create the file on the disk of a folder, which is created if it is missing.

        Raises:
            OSError: if that fails.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (`close` closes it)
        self._written: list[tuple[int, torch.Size, torch.dtype]] = []

    def append(self, tensor: Tensor) -> None:
        """Write a copy of a tensor.

        Raises:
            OSError: if that fails, for example on a full disk.
        """
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        start = math.ceil(self._file.tell() / _ALIGNMENT) * _ALIGNMENT
        self._file.seek(start)
        self._file.write(flat.numpy().data)
        self._written.append((start, tensor.shape, tensor.dtype))

    def tensors(self) -> list[Tensor]:
        """Return the tensors in the order in which they were written. To change one does not change the file.

        Raises:
            OSError: if the rest of the file cannot be written or mapped.
        """
        self._file.flush()
        if not self._file.tell():  # an empty file cannot be mapped
            return [torch.empty(shape, dtype=dtype) for _, shape, dtype in self._written]
        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        return [_tensor_in(mapped, *place) for place in self._written]

    def close(self) -> None:
        """Close the file. Tensors that are still in use stay valid."""
        self._written.clear()
        with suppress(OSError):  # of what a full disk did not take
            self._file.close()


def _tensor_in(mapped: mmap.mmap, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    n_bytes = shape.numel() * dtype.itemsize
    if not n_bytes:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mapped, dtype=torch.uint8, count=n_bytes, offset=start).view(dtype).view(shape)
