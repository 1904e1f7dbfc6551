"""One run's Accelerator, and a process left as it was found."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker, filter_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin

from ..errors import SettingsError
from ..settings import Runtime
from .state_guards import preserve_rng, seed_all

# Whole copies of the model, gradients averaged by DDP: one path, whatever the device.
_REPLICATED = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
}


@contextmanager
def accelerator_session(runtime: Runtime, seed: int, project_dir: str | None) -> Iterator[Accelerator]:
    """Create an Accelerator of the wanted precision.

    Afterwards Accelerate's shared state, the random-number generators and torch's determinism are as before, so that a
    process can have many sessions, of any precision; a process group that the launcher asked for stays up for the next.

    Args:
        project_dir: where trackers write files.

    Raises:
        SettingsError: where the processes asked for are not there, or are joined in a way not shown to be exact.
    """
    with fresh_accelerate_state():
        accelerator = _accelerator(runtime, project_dir)
        with preserve_rng(), _determinism(runtime.deterministic):
            seed_all(seed, accelerator.process_index)  # dropout must differ between processes
            try:
                yield accelerator
            finally:
                # Not `free_memory`: it walks all objects there are, for a fifth of a second, to find that none is lost.
                for held in (accelerator._models, accelerator._optimizers, accelerator._schedulers):
                    held.clear()


@contextmanager
def fresh_accelerate_state() -> Iterator[None]:
    """Empties the state that all Accelerators of a process share, and puts it back."""
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
def _determinism(wanted: bool) -> Iterator[None]:
    """Deterministic algorithms, where wanted, for the time of a session."""
    if not wanted:
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace or ":4096:8"  # without it cuBLAS refuses to be deterministic
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        if workspace is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]


def _accelerator(runtime: Runtime, project_dir: str | None) -> Accelerator:
    # The gradient accumulator tells Accelerate each window's own length, so the number of steps here is never used; and
    # a window that was read ahead must not be taken for the last because the data has ended.
    plugin = GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False)
    # A parameter may be left out of one micro-batch's loss and be part of the next one's.
    # Buffers are synced once a window by the gradient accumulator, outside of the passes.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    accelerator = Accelerator(
        # Without this, Accelerate makes torchrun's processes on a machine of CPUs strangers to each other.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=_precision(runtime),
        gradient_accumulation_plugin=plugin,
        kwargs_handlers=[unused],
        project_dir=project_dir,
    )
    accelerator.log_with = _trackers("wandb" if runtime.use_wandb else runtime.log_with, project_dir)
    asked = _processes_asked_for()
    if accelerator.num_processes != asked:
        raise SettingsError(
            [
                f"{asked} processes were asked for, but this run would have {accelerator.num_processes}. On CPUs use "
                "`torchrun --nproc_per_node`, or `accelerate launch` with a config file that says "
                "`distributed_type: MULTI_GPU` and `use_cpu: true`."
            ]
        )
    if accelerator.distributed_type not in _REPLICATED:
        raise SettingsError(
            [
                f"Accelerate was set up for {accelerator.distributed_type.value}, for which ftaccum has not been shown "
                "to be exact. Launch with one process or with data parallelism (`distributed_type: MULTI_GPU`)."
            ]
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate accepts fp16 on a CPU and then neither casts nor scales.
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    return accelerator


def _precision(runtime: Runtime) -> str | None:
    if not runtime.use_amp or runtime.mixed_precision is not None:
        return runtime.mixed_precision
    bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if bf16 else "fp16"


def _processes_asked_for() -> int:
    """As told by the launcher's environment, or else by its command line: `accelerate launch --cpu --num_processes 2`
    silently starts one process."""
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
            break  # what follows are the script's own
        name, _, joined = word.partition("=")
        if name in ("--num_processes", "--num-processes"):
            return int(joined or value)
    return 1


def _trackers(log_with: Any, output_dir: str | None) -> list[Any]:
    if log_with is None:
        return []
    asked = list(log_with) if isinstance(log_with, list | tuple) else [log_with]
    try:
        found = filter_trackers(asked, output_dir)
    except ValueError as error:
        remedy = "" if output_dir else " Trackers that write files need `output_dir`."
        raise SettingsError([f"`log_with` is {log_with!r}: {error}{remedy}"]) from error
    names = {str(one) for one in found}  # Accelerate gives names as members of an enumeration
    absent = [str(one) for one in asked if not isinstance(one, GeneralTracker) and str(one) not in {*names, "all"}]
    if absent:
        raise SettingsError([f"The trackers {absent} were asked for, but are not installed. Install them with pip."])
    return found
