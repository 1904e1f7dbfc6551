"""Tensors that are sharded over the processes, and those that are not."""

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Return whether the weights of a model are sharded over the processes."""
    return isinstance(model, FSDPModule)


def has_sharded_tensors(model: nn.Module) -> bool:
    """Return whether some weights or buffers of a model are parts of larger ones: by FSDP2, or tensor parallelism."""
    return any(isinstance(tensor, DTensor) for tensors in (model.parameters(), model.buffers()) for tensor in tensors)


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds: a view of the whole tensor, if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from all processes, which must call this together; the same one if it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
