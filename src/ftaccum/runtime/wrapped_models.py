"""The model inside the wrappers of a loop that the user wrote, and the wrappers that cannot be exact."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..errors import SettingsError
from .accelerator import REPLICATED
from .process_group import ProcessGroup
from .state_guards import fingerprint


def inner_model(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, whose hooks wait for a forward pass of their own."""
    while isinstance(model, DistributedDataParallel):
        model = model.module
    return model


def ddp_around(model: nn.Module, accelerator: Accelerator | None) -> DistributedDataParallel | None:
    """Return the DistributedDataParallel that a model is, or that Accelerate has put around it; None without one."""
    prepared = [] if accelerator is None else accelerator._models
    candidates = [model, *(each for each in prepared if inner_model(each) is model)]
    return next((each for each in candidates if isinstance(each, DistributedDataParallel)), None)


class UnfinishedForward:
    """A watch for a forward pass of DistributedDataParallel that still waits for its backward pass.

    Such a pass, an evaluation outside of `torch.no_grad()` for example, would average the next gradients of the inner
    model, whatever they are, and wait for the other processes.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self._is_pending = False
        model.register_forward_hook(self._observe)

    def check(self) -> None:
        """Raise SettingsError if a forward pass had no backward pass."""
        if self._is_pending:
            raise SettingsError(
                [
                    "DistributedDataParallel ran a forward pass with gradients, but no backward pass, so it would "
                    "average the gradients of the next pass. Evaluate the model inside `torch.no_grad()`."
                ]
            )

    def _observe(self, model: Any, inputs: Any, outputs: Any) -> None:  # noqa: ARG002
        values = outputs.values() if isinstance(outputs, Mapping) else outputs
        given = list(values) if isinstance(values, Iterable) and not isinstance(values, Tensor) else [values]
        tensors = [value for value in given if isinstance(value, Tensor) and value.requires_grad]
        if tensors and torch.is_grad_enabled() and model.require_backward_grad_sync:
            self._is_pending = True
            for tensor in tensors:
                tensor.register_hook(self._finish)

    def _finish(self, gradient: Tensor) -> None:  # noqa: ARG002
        self._is_pending = False


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model that `torch.compile` was given, or the model itself."""
    return getattr(model, "_orig_mod", model)


def faults_of_wrappers(model: nn.Module, accelerator: Accelerator | None, n_processes: int) -> list[str]:
    """Return a sentence for each reason why the gradient of a wrapped model cannot be accumulated exactly."""
    faults = []
    if accelerator is not None and accelerator.distributed_type not in REPLICATED:
        faults.append(_of_kind(accelerator.distributed_type.value))
    inner = inner_model(model)
    modules = list(inner.modules())
    kinds = {
        "FSDP": lambda: any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in modules),
        "DeepSpeed": lambda: any(type(module).__module__.startswith("deepspeed") for module in modules),
        "tensor parallelism": lambda: any(isinstance(p, DTensor) for p in inner.parameters()),
    }
    if not faults:
        faults += [_of_kind(kind) for kind, holds in kinds.items() if holds()][:1]
    if any(isinstance(module, nn.DataParallel) for module in modules):
        faults.append(
            "`model` is wrapped in DataParallel, which averages over unequal parts of a micro-batch. Launch one "
            "process per GPU with `torchrun`, and use DistributedDataParallel."
        )
    if isinstance(uncompiled(inner), DistributedDataParallel):
        faults.append(
            "`model` was compiled after it was wrapped in DistributedDataParallel. Compile the inner model first, "
            "with `model.compile()`, and then wrap it."
        )
    elif any(isinstance(module, DistributedDataParallel) for module in modules):
        faults.append(
            "A part of `model` is wrapped in DistributedDataParallel. Wrap the whole model instead, or no part of it."
        )
    if n_processes > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in modules):
        faults.append(
            "`model` has SyncBatchNorm layers, in which processes wait for each other in every forward pass. They mix "
            "the rows of a batch, so that no accumulation is exact. Use GroupNorm, LayerNorm or FrozenBatchNorm2d."
        )
    return faults + _faults_of_ddp(ddp_around(model, accelerator))


def weights_differ(model: nn.Module, process_group: ProcessGroup) -> bool:
    """Return whether the weights of a model differ between processes."""
    sums = [int(fingerprint(p.detach())) for p in model.parameters()]
    return len({str(values) for values in process_group.gather(sums)}) > 1


def _of_kind(kind: str) -> str:
    return (
        f"The model uses {kind}, but `ExactAccumulation` has only been shown to be exact if each process has the whole "
        "model. Use DistributedDataParallel (`distributed_type: MULTI_GPU`) or a single process."
    )


def _faults_of_ddp(model: DistributedDataParallel | None) -> list[str]:
    if model is None:
        return []
    faults = []
    if distributed.get_world_size(model.process_group) != distributed.get_world_size():
        faults.append(
            "The process group of `model` has only some of the processes. Gradients are averaged over all processes, "
            "so leave `process_group` of DistributedDataParallel out."
        )
    if model.mixed_precision is not None:
        faults.append(
            "`mixed_precision` of DistributedDataParallel casts weights in hooks that `ExactAccumulation` does not "
            "run. Leave it out, and call `backward` inside `torch.autocast`."
        )
    return faults
