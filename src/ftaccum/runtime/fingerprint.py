"""Checksums of buffers, and the bytes that buffers take in memory."""

from functools import cache

import torch
from torch import Tensor

_CHUNK = 2**17  # 8-byte words that a fingerprint sums at a time
_ODD = 0x1E3779B97F4A7C15


def is_expanded(buffer: Tensor) -> bool:
    """Return whether several elements of a buffer share one place in memory."""
    if buffer.layout is not torch.strided:
        return False
    return any(size > 1 and not stride for size, stride in zip(buffer.shape, buffer.stride(), strict=True))


def in_memory(buffer: Tensor) -> Tensor:
    """Return a view of a buffer without the repeated elements that take no memory."""
    return buffer[tuple(slice(0, 1) if not stride else slice(None) for stride in buffer.stride())]


def bytes_of(buffer: Tensor) -> Tensor:
    """Return the bytes of a strided buffer as a 1-D tensor."""
    flat = buffer.detach().reshape(-1).contiguous()
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)  # the stride of a single element may be 0


def fingerprint(buffer: Tensor) -> Tensor:
    """Return a checksum that changes when a buffer does: a weighted sum of its bytes, eight at a time.

    The weights are odd and drawn for each position, so that swapped numbers change the sum too. It takes little memory.
    Tensor versions are no replacement, because batch norm and writes to `.data` do not increment them. Only sparse
    buffers rely on their version.
    """
    if buffer.layout is not torch.strided:
        return torch.tensor(buffer._version, device=buffer.device)
    read, weights = bytes_of(in_memory(buffer)), _weights(buffer.device)
    whole = len(read) // 8 * 8
    total = (read[whole:] * weights[: len(read) - whole]).sum()
    for n, part in enumerate(read[:whole].split(8 * _CHUNK)):
        words = (part.clone() if part.storage_offset() % 8 else part).view(torch.int64)
        total += (words * weights[: len(words)]).sum() * (_ODD * (2 * n + 1) % 2**63)
    return total


@cache
def _weights(device: torch.device) -> Tensor:
    """Return random odd numbers, the same in each process."""
    draw = torch.Generator().manual_seed(0)
    return (torch.randint(2**62, (_CHUNK,), generator=draw) * 2 + 1).to(device)
