"""Whether an optimizer takes the same step on sharded weights as on whole ones."""

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import Optimizer

from ...errors import SettingsError
from ..optimizers import inner_optimizers
from .tensors import whole_tensor

_SHAPES = ((5, 4), (7,), (3, 2))  # of the trial's weights, which processes share unevenly
_STEPS = 3
_TOLERANCE = 1e-4
_REMEDY = (
    "Use an optimizer that treats each number by itself, such as 'adamw' or torch.optim.SGD, or leave `sharding` out."
)


def check_optimizer(optimizer: Optimizer, device: torch.device) -> None:
    """Let a copy of an optimizer step on a few small weights, whole and sharded. All processes call this together.

    An optimizer that computes with whole matrices, or with all weights together, may fail on shards, or do something
    else without an error. An optimizer that contains others cannot be copied; it may declare that it takes sharded
    weights with an attribute `takes_sharded_weights`.

    Raises:
        SettingsError: if the steps differ or change nothing, or the optimizer cannot be tried.
    """
    kind = type(optimizer).__name__
    if getattr(optimizer, "takes_sharded_weights", False):
        return
    if inner_optimizers(optimizer):
        raise SettingsError(
            [f"`sharding` is 'fsdp2', but {kind} contains other optimizers, so its step cannot be tried. {_REMEDY}"]
        )
    try:
        whole = _stepped(optimizer, device, None)
        sharded = _stepped(optimizer, device, init_device_mesh(device.type, (distributed.get_world_size(),)))
    except Exception as error:  # an optimizer may raise anything
        raise SettingsError(
            [f"`sharding` is 'fsdp2', but {kind} cannot step on sharded weights: {_first_line(error)} {_REMEDY}"]
        ) from error
    if all(torch.equal(stepped.cpu(), before) for stepped, before in zip(whole, _numbers()[0], strict=True)):
        raise SettingsError(
            [
                f"`sharding` is 'fsdp2', but {kind} does not change the weights in its `param_groups`. Sharding "
                "replaces the weights there, but not those held elsewhere. Let `step` change the weights in "
                "`param_groups`, or leave `sharding` out."
            ]
        )
    if not all(torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE) for a, b in zip(whole, sharded, strict=True)):
        raise SettingsError(
            [f"`sharding` is 'fsdp2', but {kind} takes another step on sharded weights than on whole ones. {_REMEDY}"]
        )


def _stepped(optimizer: Optimizer, device: torch.device, mesh: DeviceMesh | None) -> list[Tensor]:
    """Return the weights of the trial after a few steps.

    Args:
        mesh: the processes to shard the weights over; None for whole weights.
    """
    numbers, aims = _numbers()

    def placed(values: Tensor) -> Tensor:
        values = values.to(device)
        return values.clone() if mesh is None else distribute_tensor(values, mesh, [Shard(0)])

    weights = [nn.Parameter(placed(values)) for values in numbers]
    targets = [placed(values) for values in aims]
    trial: Any = object.__new__(type(optimizer))  # `copy.copy` leaves out attributes that are not in its state
    for name, value in vars(optimizer).items():
        if name != "step":  # which a schedule may have replaced
            vars(trial)[name] = copy.copy(value) if isinstance(value, dict | list | set) else value
    trial._optimizer_step_pre_hooks, trial._optimizer_step_post_hooks = {}, {}  # the user's hooks wait for real steps
    trial.state = defaultdict(dict)
    trial.param_groups = [{**optimizer.param_groups[0], "params": weights, "lr": 0.1}]

    for _ in range(_STEPS):
        for n, (p, target) in enumerate(zip(weights, targets, strict=True)):
            p.grad = (p.detach() - target) * (n + 1)
        trial.step()
    return [whole_tensor(p.detach()) for p in weights]


def _numbers() -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights of the trial before its first step, and those that would make its gradients zero."""
    draw = torch.Generator().manual_seed(0)
    weights, targets = ([torch.randn(shape, generator=draw) for shape in _SHAPES] for _ in range(2))
    return weights, targets


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if line.endswith(".") else f"{line}."
