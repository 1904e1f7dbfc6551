"""Tensors gathered and summed over processes, on their devices."""

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor, distributed

from .process_group import ProcessGroup

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and type of each tensor, by name


def gather_rows(
    own: Mapping[str, Tensor], specs: Sequence[Specs], process_group: ProcessGroup, device: torch.device
) -> dict[str, Tensor]:
    """Return tensors with the rows of all processes, in order of rank. All processes call this together.

    Args:
        own: this process's tensors by name, rows first; empty if it has no rows.
        specs: the shapes and types of these tensors on each process; empty for a process without rows.
        device: where the result is to be.
    """
    if process_group.is_single:
        return dict(own)
    sizes = [sum(prod(shape) * dtype.itemsize for shape, dtype in spec.values()) for spec in specs]
    # As bytes, so that all tensors take one collective, of any type.
    parts = [tensor.detach().to(device).contiguous().reshape(-1).view(torch.uint8) for tensor in own.values()]
    sent = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    if parts:
        torch.cat(parts, out=sent[: sizes[process_group.index]])
    received = [torch.empty_like(sent) for _ in specs]
    distributed.all_gather(received, sent)
    by_process = [_unpacked(data, spec) for data, spec in zip(received, specs, strict=True)]
    names = next((list(spec) for spec in specs if spec), [])
    return {name: torch.cat([tensors[name] for tensors in by_process if tensors]) for name in names}


def sum_over_processes(tensor: Tensor, process_group: ProcessGroup) -> Tensor:
    """Return the sum of a tensor over all processes, which call this together."""
    if process_group.is_single:
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Copy process 0's values of tensors to all others. Several processes call this together."""
    for tensor in tensors:
        values = tensor.data.contiguous()
        distributed.broadcast(values, src=0)
        tensor.data.copy_(values)


def _unpacked(data: Tensor, spec: Specs) -> dict[str, Tensor]:
    found, start = {}, 0
    for name, (shape, dtype) in spec.items():
        size = prod(shape) * dtype.itemsize
        found[name] = data[start : start + size].clone().view(dtype).reshape(shape)  # clones are aligned
        start += size
    return found
