"""Shard a model over the processes, block by block."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ...errors import SettingsError
from ..host import free_per_process
from ..process_group import ProcessGroup
from .options import ShardingOptions

# A whole model while its loss is measured: its weights, copies of some in float32, gradients, activations.
_COPIES = 4


def fits_whole(model: nn.Module, device: torch.device, process_group: ProcessGroup) -> bool:
    """Return whether each device has memory for a whole model while its loss is measured, before it is sharded.

    Raises:
        SettingsError: if neither a device nor its host has.
    """
    if device.type == "cpu":
        return True
    needed = _COPIES * sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    if not process_group.any(needed >= torch.accelerator.get_memory_info(device)[0]):
        return True
    on_host = free_per_process()
    if process_group.any(needed > on_host):
        raise SettingsError(
            [
                "Before the model is sharded, its loss is measured on the whole model. This needs "
                f"{needed / 1e9:.0f} GB per process, but neither a device nor the host has as much free (the host has "
                f"{on_host / 1e9:.0f} GB per process). Start fewer processes per machine, or load the model in 16 bits "
                "(`dtype='bfloat16'`)."
            ]
        )
    return False


def shard_model(
    model: nn.Module, units: Sequence[str], device: torch.device, options: ShardingOptions
) -> list[FSDPModule]:
    """Shard the weights of a model, in place, and return its units in order. All processes must call this together.

    The weights become those of the main process. The device holds one whole unit at a time. Weights without dimensions
    or numbers stay whole on each process.

    Args:
        units: the names of the modules to gather separately; the rest of the model is gathered as one.
        device: the device of this process.

    Raises:
        SettingsError: if the weights that one unit trains have different types.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    whole = {p for p in model.parameters() if p.ndim == 0 or not p.numel()}
    modules = [model.get_submodule(name) for name in units]
    _check_types(model, modules, units)
    placed: set[Tensor] = set()
    for module in modules:
        _place(module, device, placed)
        _shard(module, mesh, options, whole, reshards=options.reshard_after_forward)
    _place(model, device, placed)
    _shard(model, mesh, options, whole, reshards=None)
    assert isinstance(model, FSDPModule)
    model.set_reduce_scatter_unused_params(True)  # a weight may be used on one process and not on another
    return [module for module in modules if isinstance(module, FSDPModule)]


def _place(module: nn.Module, device: torch.device, placed: set[Tensor]) -> None:
    """Move the tensors of a module to the device, contiguous, and give them the main process's values."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor in placed or isinstance(tensor, DTensor):
            continue
        # FSDP2 rejects weights that are not contiguous.
        tensor.data = tensor.data.to(device, memory_format=torch.contiguous_format).contiguous()
        if isinstance(tensor, nn.Parameter):
            distributed.broadcast(tensor.data, src=0)
        placed.add(tensor)


def _shard(
    module: nn.Module, mesh: DeviceMesh, options: ShardingOptions, whole: set[nn.Parameter], *, reshards: bool | None
) -> None:
    offloads = options.cpu_offload and mesh.device_type != "cpu"
    fully_shard(
        module,
        mesh=mesh,
        reshard_after_forward=reshards,
        mp_policy=MixedPrecisionPolicy(reduce_dtype=_reduce_type(module)),
        offload_policy=CPUOffloadPolicy() if offloads else OffloadPolicy(),
        ignored_params=whole,
    )


def _reduce_type(module: nn.Module) -> torch.dtype | None:
    """Return the type in which the gradients of a module are summed: float32 if its weights have 16 bits."""
    trained = {p.dtype for p in module.parameters() if p.requires_grad and p.is_floating_point()}
    return torch.float32 if any(dtype.itemsize == 2 for dtype in trained) else None


def _check_types(model: nn.Module, modules: Sequence[nn.Module], names: Sequence[str]) -> None:
    """Refuse units whose trained weights have different types: FSDP2 sums their gradients in one tensor."""
    inside = {id(p) for module in modules for p in module.parameters()}
    rest = [p for p in model.parameters() if id(p) not in inside]
    for name, weights in [*zip(names, (list(m.parameters()) for m in modules), strict=True), ("", rest)]:
        types = sorted({str(p.dtype).removeprefix("torch.") for p in weights if p.requires_grad and p.ndim})
        if len(types) > 1:
            where = f"`{name}`" if name else "the model outside of its blocks"
            raise SettingsError(
                [
                    f"The model is sharded, but {where} has trained weights of the types {' and '.join(types)}, which "
                    "FSDP2 cannot shard together. Convert the model to one type, such as `model.float()` or "
                    "`model.bfloat16()`."
                ]
            )
