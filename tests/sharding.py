"""Sharded tensors and models in one process: a process of a fake group, or the only one of a real group."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from ftaccum.runtime.sharding.layout import Layout

can_shard = hasattr(FSDPModule, "reset_iter_state")
needs_sharding = pytest.mark.skipif(not can_shard, reason="`sharding` is refused with this version of torch")


@contextmanager
def as_process(process: int, processes: int) -> Iterator[DeviceMesh]:
    """Act as one of several processes that communicate nothing, until exit. Yields the mesh of the processes."""
    distributed.init_process_group("fake", rank=process, world_size=processes, store=FakeStore())
    try:
        # torch caches by mesh, so those of two processes must differ.
        yield init_device_mesh("cpu", (processes,), mesh_dim_names=(f"of_process_{process}",))
    finally:
        distributed.destroy_process_group()


@contextmanager
def single_gloo() -> Iterator[None]:
    """Act as the only process of a group that communicates, until exit."""
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()


def sharded(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """Return a tensor that the processes of a mesh share, as FSDP2 does."""
    layout = Layout(tuple(whole.shape), mesh, (0,))
    offset, shape = layout.local_box()
    return layout.assemble(whole[offset[0] : offset[0] + shape[0]].clone())


def small_model() -> nn.Module:
    """Return a model with a weight that no pass uses, a frozen one and a buffer, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 7)).double()
    model.register_parameter("unused", nn.Parameter(torch.ones(5, dtype=torch.float64)))
    model[2].bias.requires_grad_(False)
    return model


def sharded_model() -> nn.Module:
    """Return the small model, sharded over the processes of the default group."""
    model = small_model()
    for module in model:  # type: ignore[attr-defined]
        fully_shard(module)
    return fully_shard(model)
