"""Where the part of a sharded tensor that this process holds lies in the whole tensor."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .tensors import local_part


@dataclass(frozen=True)
class Layout:
    """How the processes share a tensor.

    Attributes:
        shape: the shape of the whole tensor.
        mesh: the processes.
        sharded_dims: for each dimension of the mesh, the dimension of the tensor that it splits; None for copies.
    """

    shape: tuple[int, ...]
    mesh: DeviceMesh
    sharded_dims: tuple[int | None, ...]

    @classmethod
    def of(cls, tensor: DTensor) -> "Layout":
        """Return the layout of a tensor.

        Raises:
            ValueError: if processes hold terms of a sum that is not computed yet.
        """
        return cls(tuple(tensor.shape), tensor.device_mesh, tuple(map(_sharded_dim, tensor.placements)))

    def local_box(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return where this process's part begins in the whole tensor, and its shape."""
        size = torch.Size(self.shape)
        shape, offset = compute_local_shape_and_global_offset(size, self.mesh, self._placements())
        return tuple(offset), tuple(shape)

    def assemble(self, part: Tensor) -> DTensor:
        """Return the tensor whose parts the processes give, each its own. Communicates nothing."""
        shape = torch.Size(self.shape)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            part, self.mesh, self._placements(), run_check=False, shape=shape, stride=stride
        )  # fmt: skip

    def _placements(self) -> list[Placement]:
        return [Replicate() if dim is None else Shard(dim) for dim in self.sharded_dims]


def shard_like(value: Any, weight: Tensor) -> Any:
    """Return this process's part of state that has the shape of a weight, shared as the weight is; else the state."""
    if not (isinstance(value, Tensor) and isinstance(weight, DTensor) and value.shape == weight.shape):
        return value
    offset, shape = Layout.of(weight).local_box()
    own = tuple(slice(first, first + n) for first, n in zip(offset, shape, strict=True))
    state = torch.empty_like(weight.detach(), dtype=value.dtype)  # on its device, which offloading changes
    local_part(state).copy_(value[own])
    return state


def reshard(model: nn.Module) -> None:
    """Free the gathered weights of a sharded model, so that its parameters are the sharded ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def unsharded_class(model: nn.Module) -> type:
    """Return the class that a model had before its weights were sharded, which changes it."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def leading_values(tensors: Sequence[Tensor], n: int) -> list[list[float]]:
    """Return the first n numbers of each tensor. If one is sharded, all processes must call this together."""
    own = [_leading_part(tensor, n) for tensor in tensors]
    parts = [own]
    if any(isinstance(tensor, DTensor) for tensor in tensors):
        parts = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(parts, own)
    return [[value for _, value in sorted(_merged(each))] for each in zip(*parts, strict=True)]


def _leading_part(tensor: Tensor, n: int) -> dict[int, float]:
    """Return those of the first n numbers that this process holds, by position in the flattened tensor."""
    if not isinstance(tensor, DTensor):
        return dict(enumerate(tensor.flatten()[:n].tolist()))
    offset, shape = Layout.of(tensor).local_box()
    places = torch.arange(min(n, tensor.numel()))
    held, indices = torch.ones_like(places, dtype=torch.bool), []
    for size, first, length in zip(reversed(tensor.shape), reversed(offset), reversed(shape), strict=True):
        index = places % size - first
        held &= (index >= 0) & (index < length)
        indices.append(index)
        places = places // size
    local = tensor.to_local().detach()
    values = local[tuple(index[held].to(local.device) for index in reversed(indices))].tolist()
    return dict(zip(held.nonzero().flatten().tolist(), values, strict=True))


def _merged(parts: Iterable[dict[int, float]]) -> list[tuple[int, float]]:
    found: dict[int, float] = {}
    for part in parts:
        found |= part
    return [*found.items()]


def _sharded_dim(placement: Placement) -> int | None:
    if isinstance(placement, Shard):
        return placement.dim
    if isinstance(placement, Replicate):
        return None
    raise ValueError(f"a tensor with the placement {placement} cannot be saved in parts")
