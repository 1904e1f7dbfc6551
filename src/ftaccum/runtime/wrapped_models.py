"""The model inside the wrappers of a loop that the user wrote, and the wrappers that cannot be exact."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..errors import SettingsError
from .accelerator import REPLICATED
from .fingerprint import fingerprint
from .process_group import ProcessGroup

DATA_PARALLEL = (
    "`model` runs in DataParallel, which averages over unequal parts of a micro-batch with equal weights. Launch one "
    "process per device, with `torchrun` or `accelerate launch`."
)


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
    model, whatever they are, and wait for the other processes. The watch ends with this object.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self._passes = _Passes()  # an object of its own: the hook of the model would keep this one
        weakref.finalize(self, model.register_forward_hook(self._passes.observe).remove)

    def check(self) -> None:
        """Raise SettingsError if a forward pass had no backward pass."""
        if self._passes.is_pending:
            raise SettingsError(
                [
                    "DistributedDataParallel ran a forward pass with gradients, but no backward pass, so it would "
                    "average the gradients of the next pass. Evaluate the model inside `torch.no_grad()`."
                ]
            )


class _Passes:
    """Whether the last forward pass of a model waits for its backward pass."""

    is_pending = False

    def observe(self, model: Any, inputs: Any, outputs: Any) -> None:  # noqa: ARG002
        tensors = [tensor for tensor in _tensors_in(outputs) if tensor.requires_grad]
        if tensors and torch.is_grad_enabled() and model.require_backward_grad_sync:
            self.is_pending = True
            for tensor in tensors:
                tensor.register_hook(self._finish)

    def _finish(self, gradient: Tensor) -> None:  # noqa: ARG002
        self.is_pending = False


def _tensors_in(outputs: Any) -> Iterator[Tensor]:
    """Yield the tensors in the outputs of a model, at any depth."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        yield from _tensors_in(list(outputs.values()))
    elif isinstance(outputs, list | tuple | set):
        for each in outputs:
            yield from _tensors_in(each)
    elif is_dataclass(outputs):
        yield from _tensors_in([getattr(outputs, field.name) for field in fields(outputs)])


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model that `torch.compile` was given, or the model itself."""
    return getattr(model, "_orig_mod", model)


def faults_of_wrappers(model: nn.Module, accelerator: Accelerator | None, n_processes: int) -> list[str]:
    """Return a sentence for each reason why the gradient of a loop's wrapped model cannot be accumulated exactly."""
    kinds = [] if accelerator is None or accelerator.distributed_type in REPLICATED else [accelerator.distributed_type]
    faults = faults_of_model(model, n_processes, "ExactAccumulation", [kind.value for kind in kinds])
    return faults + _faults_of_ddp(ddp_around(model, accelerator))


def faults_of_model(model: nn.Module, n_processes: int, caller: str, configured: Sequence[str] = ()) -> list[str]:
    """Return a sentence for each reason why the gradient of a model cannot be accumulated exactly.

    Args:
        caller: the function or class of ftaccum that the model was given to.
        configured: kinds of parallelism that the processes were launched with, and that split the model.
    """
    inner = inner_model(model)
    modules = list(inner.modules())
    kinds = {
        "FSDP": lambda: any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in modules),
        "DeepSpeed": lambda: any(type(module).__module__.startswith("deepspeed") for module in modules),
        "tensor parallelism": lambda: any(isinstance(p, DTensor) for p in inner.parameters()),
    }
    found = configured or [kind for kind, holds in kinds.items() if holds()]
    faults = [
        f"The model uses {kind}, but `{caller}` has only been shown to be exact if each process has the whole model. "
        "Use DistributedDataParallel (`distributed_type: MULTI_GPU`) or a single process."
        for kind in found[:1]
    ]
    if any(isinstance(module, nn.DataParallel) for module in modules):
        faults.append(DATA_PARALLEL)
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
    return faults


def weights_differ(model: nn.Module, process_group: ProcessGroup) -> bool:
    """Return whether the weights of a model differ between processes."""
    sums = [int(fingerprint(p.detach())) for p in model.parameters()]
    return len({str(values) for values in process_group.gather(sums)}) > 1


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
    elif hook := model._get_ddp_logging_data().get("comm_hook"):
        faults.append(
            f"`model` has the communication hook {hook}, but `ExactAccumulation` syncs gradients without it. Leave out "
            "`register_comm_hook`, or `comm_hook` of Accelerate's `DistributedDataParallelKwargs`."
        )
    return faults
