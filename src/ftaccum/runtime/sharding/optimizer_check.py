"""Whether an optimizer takes the same step on sharded weights as on whole ones."""

import copy
from collections import defaultdict
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import Optimizer

from ...errors import SettingsError, first_line
from ..optimizers import inner_optimizers
from ..process_group import ProcessGroup
from ..state_guards import preserve_rng
from .tensors import whole_tensor

_SHAPES = ((5, 4), (7,), (3, 2))  # of the trial's weights, which processes share unevenly
_STEPS = 3
_TOLERANCE = 1e-4
_REMEDY = (
    "Use an optimizer that updates weights element by element, such as 'adamw' or torch.optim.SGD, or set "
    "`sharding='off'`."
)


def check_optimizer(optimizer: Optimizer, device: torch.device, process_group: ProcessGroup) -> None:
    """Let a copy of an optimizer step on a few small weights, whole and sharded. All processes call this together.

    An optimizer that computes with whole matrices, or with all weights together, may fail on shards, or do something
    else without an error. An optimizer that contains others cannot be copied; it may declare that it takes sharded
    weights with an attribute `takes_sharded_weights`.

    Raises:
        SettingsError: on all processes, if the steps differ or change nothing, or the optimizer cannot be tried.
    """
    if getattr(optimizer, "takes_sharded_weights", False):
        return
    kind = type(optimizer).__name__
    if inner_optimizers(optimizer):
        _refuse(f"{kind} contains other optimizers, so its step cannot be tried. {_REMEDY}")
    with preserve_rng():
        whole = _tried(optimizer, device, None, process_group)
        sharded = _tried(optimizer, device, init_device_mesh(device.type, (process_group.size,)), process_group)
    if all(torch.equal(stepped.cpu(), before) for stepped, before in zip(whole, _numbers()[0], strict=True)):
        _refuse(
            f"{kind} does not change the weights in its `param_groups`. Sharding replaces the weights there, but not "
            "those held elsewhere. Let `step` change the weights in `param_groups`, or set `sharding='off'`."
        )
    pairs = zip(whole, sharded, strict=True)
    if process_group.any(not all(torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE) for a, b in pairs)):
        _refuse(f"{kind} computes another update on sharded weights than on whole ones. {_REMEDY}")


def _refuse(fault: str) -> NoReturn:
    raise SettingsError([f"The model is sharded, but {fault}"])


def _tried(
    optimizer: Optimizer, device: torch.device, mesh: DeviceMesh | None, process_group: ProcessGroup
) -> list[Tensor]:
    """Return the weights of the trial after a few steps. Raise SettingsError on all processes if one fails."""
    found: list[Tensor] | str
    try:
        found = _stepped(optimizer, device, mesh)
    except Exception as error:  # an optimizer may raise anything
        found = first_line(error)
    faults = process_group.gather(found if isinstance(found, str) else None)
    if fault := next(filter(None, faults), None):
        _refuse(f"{type(optimizer).__name__} cannot step on sharded weights: {fault}. {_REMEDY}")
    assert not isinstance(found, str)
    return found


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
