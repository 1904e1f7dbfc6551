"""Create the Accelerator of a run, and restore the process's global state afterwards."""

import difflib
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import filter_trackers, get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    GradientAccumulationPlugin,
    LoggerType,
)

from ..errors import SettingsError, fault_of_class
from ..settings.runtime import Runtime
from .process_group import ProcessGroup, open_process_group
from .sharding.launcher import hidden_modes
from .state_guards import preserve_rng, seed_all

# Each process has a whole copy of the model, and DDP averages the gradients: one code path for all devices.
REPLICATED = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
}
_KINDS = {"cpu": DistributedType.MULTI_CPU, "xpu": DistributedType.MULTI_XPU, "npu": DistributedType.MULTI_NPU}


def compiles_models(accelerator: Accelerator) -> bool:
    """Return whether the settings of the launcher make Accelerate compile models."""
    return bool(accelerator.state.dynamo_plugin.backend != DynamoBackend.NO)


@contextmanager
def accelerator_session(runtime: Runtime, seed: int, project_dir: str | None) -> Iterator[Accelerator]:
    """Create an Accelerator with the run's precision, and restore the process's global state on exit.

    The global state is Accelerate's shared state, the random number generators and torch's determinism setting. So a
    process can have many sessions, of any precision. A process group that the launcher asked for stays open for the
    next session.

    Accelerate itself never shards the model, even if the launcher asks for FSDP.

    Args:
        project_dir: the folder where trackers write files.

    Raises:
        SettingsError: if the number of processes is not the requested one, if their kind of parallelism has not been
            shown to be exact, or if a tracker is not installed.
    """
    with fresh_accelerate_state(), _data_parallel(launched_state()):
        with hidden_modes():
            accelerator = _accelerator(runtime, project_dir)
        with preserve_rng(), _determinism() if runtime.deterministic else nullcontext():
            seed_all(seed, accelerator.process_index)  # dropout must differ between processes
            try:
                yield accelerator
            finally:
                # Not `free_memory`, which needs 0.2 s to collect garbage and finds none.
                for held in (accelerator._models, accelerator._optimizers, accelerator._schedulers):
                    held.clear()


@contextmanager
def launched_processes() -> Iterator[ProcessGroup]:
    """Open a group over the processes that the launcher started. The runs that follow use the same processes."""
    with open_process_group(launched_state().num_processes) as process_group:
        yield process_group


def launched_state() -> PartialState:
    """Return Accelerate's state of the processes that the launcher started, and connect them."""
    # Accelerate must see that the launcher asks for FSDP, because offloaded weights need a backend for the host too.
    with hidden_modes("ACCELERATE_USE_DEEPSPEED"):
        return PartialState(cpu=not torch.accelerator.is_available())  # as in `_accelerator`


@contextmanager
def _data_parallel(state: PartialState) -> Iterator[None]:
    """Make Accelerate forget, until exit, that an Accelerator of the user has been set up for FSDP."""
    shared = state._shared_state
    if shared.get("distributed_type") != DistributedType.FSDP:
        yield
        return
    shared["distributed_type"] = _KINDS.get(state.device.type, DistributedType.MULTI_GPU)
    try:
        yield
    finally:
        shared["distributed_type"] = DistributedType.FSDP


@contextmanager
def fresh_accelerate_state() -> Iterator[None]:
    """Clear the state that all Accelerators of a process share, and restore it on exit."""
    shared = {state: dict(state._shared_state) for state in (AcceleratorState, GradientState)}
    for state in shared:
        state._shared_state.clear()
    try:
        yield
    finally:
        for state, before in shared.items():
            state._shared_state.clear()
            state._shared_state.update(before)


@contextmanager
def _determinism() -> Iterator[None]:
    """Make torch use deterministic algorithms until exit."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace or ":4096:8"  # cuBLAS requires it in order to be deterministic
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        if workspace is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]


def _accelerator(runtime: Runtime, project_dir: str | None) -> Accelerator:
    # The gradient accumulator passes each window's own length to Accelerate, so `num_steps` is never used. And
    # Accelerate must not take a window for the last one because the loader, which reads ahead, has no more data.
    plugin = GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False)
    # A parameter may be unused in the loss of one micro-batch and used in that of the next.
    # The gradient accumulator syncs buffers once per window, outside the passes.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    accelerator = Accelerator(
        # Without this, Accelerate does not connect the processes that torchrun starts on a CPU-only machine.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=_precision(runtime),
        gradient_accumulation_plugin=plugin,
        kwargs_handlers=[unused],
        project_dir=project_dir,
    )
    accelerator.log_with = find_trackers(runtime, project_dir)
    check_processes(accelerator.num_processes)
    if accelerator.distributed_type not in REPLICATED:
        raise SettingsError(
            [
                f"Accelerate is configured for {accelerator.distributed_type.value}, but ftaccum has not been shown to "
                "be exact with it. Launch a single process or use data parallelism (`distributed_type: MULTI_GPU`)."
            ]
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate accepts fp16 on a CPU, but then neither autocasts nor scales gradients.
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    return accelerator


def _precision(runtime: Runtime) -> str | None:
    if not runtime.use_amp or runtime.mixed_precision is not None:
        return runtime.mixed_precision
    bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if bf16 else "fp16"


def is_first_process() -> bool:
    """Return whether this is the only process, or the first one that the launcher started."""
    return os.environ.get("RANK", "0") == "0"


def check_processes(n_processes: int) -> None:
    """Check that there are as many processes as the user has asked the launcher for.

    Raises:
        SettingsError: if there are not.
    """
    asked = requested_processes()
    if n_processes != asked:
        raise SettingsError(
            [
                f"{asked} processes were requested, but this run would have {n_processes}. On CPUs use "
                "`torchrun --nproc_per_node`, or `accelerate launch` with a config file that contains "
                "`distributed_type: MULTI_GPU` and `use_cpu: true`."
            ]
        )


def requested_processes() -> int:
    """Return the number of processes in the launcher's environment, or else on its command line.

    The command line matters because `accelerate launch --cpu --num_processes 2` silently starts only one process.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent is not None else []
    except psutil.Error:  # another user's process, or one that has just ended
        return 1
    starts = [n for n in range(1, len(words)) if words[n] == "launch" and Path(words[n - 1]).name == "accelerate"]
    starts += [n for n, word in enumerate(words) if word == "accelerate.commands.launch"]
    for word, value in itertools.pairwise([*words[starts[0] :], ""] if starts else []):
        if word.endswith(".py") or word in ("-m", "--module"):
            break  # the rest are the script's own arguments
        name, _, joined = word.partition("=")
        if name in ("--num_processes", "--num-processes"):
            return int(joined or value)
    return 1


def find_trackers(runtime: Runtime, output_dir: str | None) -> list[Any]:
    """Return the trackers that a run asks for, as Accelerate names them.

    Args:
        output_dir: the folder where trackers write files.

    Raises:
        SettingsError: if a tracker is unknown, not installed, or needs a folder.
    """
    log_with: Any = "wandb" if runtime.use_wandb else runtime.log_with
    if log_with is None:
        return []
    asked = list(log_with) if isinstance(log_with, list | tuple) else [log_with]
    if strays := [fault for one in asked if (fault := _fault_of_tracker(one))]:
        raise SettingsError(strays)
    usable = {"all", *map(str, get_available_trackers())}
    # Without this check, `filter_trackers` would log a missing tracker, which fails before there is an Accelerator.
    absent = [str(one) for one in asked if str(one) in LoggerType.list() and str(one) not in usable]
    if absent:
        raise SettingsError([f"The trackers {absent} were requested, but are not installed. Install them with pip."])
    try:
        return filter_trackers(asked, output_dir)
    except ValueError as error:
        remedy = "" if output_dir else " Trackers that write files need `output_dir`."
        raise SettingsError([f"`log_with` is {log_with!r}: {error}{remedy}"]) from error


def _fault_of_tracker(one: Any) -> str | None:
    names = [str(name) for name in LoggerType.list()]
    if not isinstance(one, str) or one in names:
        return fault_of_class("log_with", one)
    near = difflib.get_close_matches(one, names, 1)
    remedy = f"Did you mean {near[0]!r}?" if near else "None logs to no tracker."
    allowed = ", ".join(map(repr, names))
    return f"`log_with` is {one!r}, but must be one of {allowed}, a GeneralTracker or None. {remedy}"
