"""Whether a run shards its model: from its settings, and from the environment that `accelerate launch` sets."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import FullyShardedDataParallelPlugin, ParallelismConfig
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

from ...errors import SettingsError, refuse
from ...settings.runtime import Runtime
from ..temporary_attribute import temporary_attribute
from .options import ShardingOptions

_FSDP, _PARALLELISM = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"
_OTHERS = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
_MODES = (_FSDP, _PARALLELISM, *_OTHERS)
_NEEDED = ("reset_iter_state", "set_reduce_scatter_unused_params")  # methods that older versions of torch lack
_OFF = "set `sharding='off'` to train a whole copy of the model on each process"
_FILE = "the config file of `accelerate launch`"
# Options of FSDP that FSDP2 or ftaccum does not use, and the values that ask for nothing.
_UNUSED = {
    "backward_prefetch": ("", "no_prefetch"),
    "forward_prefetch": ("", "false"),
    "use_orig_params": ("", "true"),
    "sync_module_states": ("", "true"),
    "sharding_strategy": ("", "full_shard", "1"),
    "state_dict_type": ("",),
    "ignored_modules": ("",),
    "activation_checkpointing_offload": ("", "false"),
}


def find_sharding(runtime: Runtime, num_processes: int) -> ShardingOptions | None:
    """Return how a run shards its model; None if each process holds all of it.

    Args:
        num_processes: the number of processes of the run.

    Raises:
        SettingsError: if the launcher asks for a kind of parallelism that ftaccum does not support, or if torch is too
            old.
    """
    if runtime.sharding == "off":
        return None
    refuse(_faults_of_other_modes(num_processes))
    if num_processes == 1 or not _asks(runtime):
        return None
    if not all(hasattr(FSDPModule, name) for name in _NEEDED):
        raise SettingsError(
            [
                f"{_asks(runtime)}, which needs torch 2.13, but {torch.__version__} is installed. Update torch, or "
                f"{_OFF}."
            ]
        )
    syncs_each_pass = runtime.sync == "each"
    if not (_is_on(_FSDP) and _version() == "2"):
        if runtime.sharding is None:
            raise SettingsError([_fault_of_version()])
        return ShardingOptions(syncs_each_pass=syncs_each_pass)
    plugin = _read_plugin()
    return ShardingOptions(
        reshard_after_forward=bool(plugin.reshard_after_forward),
        cpu_offload=isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        block_classes=tuple(name.strip() for name in plugin.transformer_cls_names_to_wrap or () if name.strip()),
        syncs_each_pass=syncs_each_pass,
        checkpoints_activations=bool(plugin.activation_checkpointing),
    )


def sharding_notes(runtime: Runtime, num_processes: int) -> list[str]:
    """Return the lines to log about what a run does not take from its settings or its launcher.

    Args:
        num_processes: the number of processes of the run.
    """
    launched = [name for mode, name in ((_FSDP, "FSDP"), *_OTHERS.items()) if _is_on(mode)]
    if runtime.sharding == "off":
        note = f"`sharding` is 'off': each process trains a whole copy, without the launcher's {' and '.join(launched)}"
        return [note] if launched else []
    asks = _asks(runtime)
    if not asks:
        return []
    if num_processes == 1:
        return [f"{asks}, but there is only one process, so nothing is sharded"]
    if not _is_on(_FSDP):
        return []
    if _version() != "2":
        return [f"`sharding` is 'fsdp2', so the launcher's options of FSDP version {_version()} have no effect"]
    unused = [name for name, silent in _UNUSED.items() if _option(name).lower() not in silent]
    if _option("auto_wrap_policy").lower() == "size_based_wrap":
        unused.append("min_num_params")
    names = ", ".join(f"`fsdp_{name}`" for name in unused)
    return [f"These options of FSDP have no effect: {names}"] if names else []


def ignored_modes() -> list[str]:
    """Return a line to log about the parallelism that the launcher asks for, for a run that does not train."""
    asked = [name for mode, name in ((_FSDP, "FSDP"), *_OTHERS.items()) if _is_on(mode)]
    note = f"The launcher's {' and '.join(asked)} has no effect here: each process holds the whole model"
    return [note] if asked else []


@contextmanager
def hidden_modes(*modes: str) -> Iterator[None]:
    """Hide from Accelerate and Transformers that the launcher asks for FSDP, DeepSpeed or other parallelism.

    Accelerate would shard the model itself, or on a CPU not at all. Transformers would load the weights on only one
    process of a machine.

    Args:
        modes: the variables to hide; all of them by default.
    """
    before = {name: os.environ.pop(name) for name in modes or _MODES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def loads_on_one_process() -> bool:
    """Return whether Transformers, outside of `hidden_modes`, loads weights on the first process of a machine only."""
    return _is_on(_FSDP) and _option("cpu_ram_efficient_loading").lower() == "true"


def _asks(runtime: Runtime) -> str:
    """Return the beginning of a sentence that says who asks for sharding; empty if no one does."""
    if runtime.sharding == "fsdp2":
        return "`sharding` is 'fsdp2'"
    return "The launcher asks for FSDP (`distributed_type: FSDP`)" if _is_on(_FSDP) else ""


def _faults_of_other_modes(num_processes: int) -> list[str]:
    """Return a sentence for each kind of parallelism that the launcher asks for and ftaccum does not support."""
    faults = [
        f"The launcher asks for {name}, which ftaccum does not support. To shard the model, write `distributed_type: "
        f"FSDP` and `fsdp_version: 2` into {_FILE}; or {_OFF}."
        for mode, name in _OTHERS.items()
        if _is_on(mode)
    ]
    return [*faults, *_faults_of_parallelism(num_processes)] if _is_on(_PARALLELISM) else faults


def _faults_of_parallelism(num_processes: int) -> list[str]:
    try:
        config = ParallelismConfig()
    except (ValueError, TypeError) as error:
        return [f"Accelerate does not accept the launcher's `parallelism_config`: {error} Correct it in {_FILE}."]
    kinds = {
        "tp": "tensor parallelism",
        "cp": "context parallelism",
        "sp": "sequence parallelism",
        "dp_replicate": "copies of a sharded model (HSDP)",
    }
    faults = [
        f"`parallelism_config_{kind}_size` is {size}, but ftaccum does not support {name}. Set it to 1 in {_FILE}; the "
        f"model is then sharded over all {num_processes} processes."
        for kind, name in kinds.items()
        if (size := getattr(config, f"{kind}_size", None) or 1) > 1  # older versions have no `sp_size`
    ]
    if not faults and (size := config.dp_shard_size or 1) not in (1, num_processes):
        faults.append(
            f"`parallelism_config_dp_shard_size` is {size}, but there are {num_processes} processes, and ftaccum "
            f"shards over all of them. Set it to {num_processes} in {_FILE}, or leave it out."
        )
    return faults


def _fault_of_version() -> str:
    return (
        f"The launcher asks for FSDP with `fsdp_version: {_version()}` (1 is the default), but ftaccum shards with "
        f"version 2. Write `fsdp_version: 2` into {_FILE} (`accelerate to-fsdp2` converts the other options); or "
        f"{_OFF}."
    )


def _read_plugin() -> FullyShardedDataParallelPlugin:
    """Return Accelerate's own reading of the launcher's variables."""
    warns = logging.getLogger(FullyShardedDataParallelPlugin.__module__)  # of options that `sharding_notes` names
    try:
        with temporary_attribute(warns, "disabled", True):
            return FullyShardedDataParallelPlugin()
    except (ValueError, KeyError, AttributeError) as error:
        raise SettingsError(
            [f"Accelerate does not accept the launcher's options of FSDP: {error} Correct `fsdp_config` in {_FILE}."]
        ) from error


def _is_on(mode: str) -> bool:
    return os.environ.get(mode, "").lower() == "true"


def _version() -> str:
    return os.environ.get("FSDP_VERSION", "1")


def _option(name: str) -> str:
    return os.environ.get(f"FSDP_{name.upper()}", "")
