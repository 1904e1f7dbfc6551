"""Check a model and an optimizer that are to be sharded over the processes, and describe how."""

from typing import Any

from torch import nn
from torch.optim import Optimizer, SparseAdam

from ..errors import refuse
from ..runtime.adapters import has_adapters
from ..runtime.gradient_hooks import sees_gradient
from ..runtime.model_wrapper import model_to_save
from ..runtime.optimizers import inner_optimizers
from ..runtime.sharding.options import ShardingOptions
from ..runtime.sharding.units import CallOrder
from ..settings.recipe import Recipe
from ..settings.runtime import Runtime
from .adapters import quantised_bits
from .config import Components

WHOLE = "train a whole copy on each process (`sharding='off'`)"
_WHOLE_MATRICES = ("adafactor", "adamw_8bit", "paged_adamw_8bit")  # optimizers that fail on shards


def check_sharding(components: Components, recipe: Recipe, runtime: Runtime, options: ShardingOptions | None) -> None:
    """Check that a model and an optimizer can be sharded, before anything is loaded or moved.

    Args:
        options: how the model is sharded; None to check nothing, because each process holds all of it.

    Raises:
        SettingsError: with a sentence for each fault.
    """
    if options is None:
        return
    refuse(
        [
            *_faults_of_model(components.model),
            *_faults_of_save(components, runtime.save),
            *_faults_of_name(recipe.optimizer),
            *_faults_of_optimizer(components.optimizer),
        ]
    )


def describe_sharding(options: ShardingOptions | None, order: CallOrder | None) -> list[str]:
    """Return the banner's line about sharding; none for whole copies."""
    if options is None or order is None:
        return []
    passes = "each pass" if options.syncs_each_pass else "the last pass of an update"
    return [f"Sharding: FSDP2; {len(order.names)} blocks are gathered one at a time; gradients are synced in {passes}"]


def _faults_of_model(model: nn.Module) -> list[str]:
    faults = []
    bits = quantised_bits(model)
    if bits or any(getattr(module, "is_quantized", False) for module in model.modules()):
        kind = f"of {bits} bits" if bits else "that are quantized"
        faults.append(
            f"`model` has weights {kind}, which FSDP2 cannot shard. Load it in 16 bits (`dtype='bfloat16'`), or "
            f"{WHOLE}."
        )
    maps = [getattr(module, "hf_device_map", None) or {} for module in model.modules()]
    devices = sorted({str(device) for each in maps for device in each.values()})
    if len(devices) > 1:
        faults.append(
            f"`model` is spread over the devices {', '.join(devices)} by `device_map`, but each process must shard the "
            "whole model. Load it without `device_map`."
        )
    tables = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    ]
    if tables:
        faults.append(
            f"`model` has embedding tables with sparse gradients ({', '.join(tables)}), which FSDP2 does not support. "
            f"Create them with `sparse=False`, or {WHOLE}."
        )
    hooked = [name for name, p in model.named_parameters() if p.ndim and sees_gradient(p)]
    if hooked:
        rest = f" and {len(hooked) - 1} more" if len(hooked) > 1 else ""
        faults.append(
            f"`model` has weights with hooks on their gradients ({hooked[0]}{rest}), which sharded weights would lose. "
            f"Remove the hooks, or {WHOLE}."
        )
    return faults


def _faults_of_save(components: Components, save: str) -> list[str]:
    adds = components.lora is not None and components.lora is not False
    if save == "adapter" or not (adds or has_adapters(model_to_save(components.model))):
        return []
    return [
        f"`save` is {save!r}, but the adapters of a sharded model cannot be merged. Leave `save` out, and run `ftaccum "
        "merge` afterwards, which merges the saved adapters into the base model."
    ]


def _faults_of_name(optimizer: str | None) -> list[str]:
    if optimizer not in _WHOLE_MATRICES:
        return []
    return [
        f"`optimizer` is {optimizer!r}, which cannot step on sharded weights. Use 'adamw', 'sgd', 'lion', 'muon' or "
        f"'schedule_free_adamw', or {WHOLE}."
    ]


def _faults_of_optimizer(optimizer: Any) -> list[str]:
    kind = getattr(optimizer, "func", optimizer)  # of a functools.partial
    every = [optimizer, *inner_optimizers(optimizer)] if isinstance(optimizer, Optimizer) else []
    faults = []
    if kind is SparseAdam or any(isinstance(each, SparseAdam) for each in every):
        faults.append(
            "`optimizer` is SparseAdam, which takes sparse gradients only, and those of a sharded model are dense. Use "
            f"another optimizer, or {WHOLE}."
        )
    # Adagrad, for one, makes its state before the first step.
    steps = [state.get("step", 1) for each in every for state in each.state.values()]
    if any(float(step) > 0 for step in steps):
        faults.append(
            f"`optimizer` ({type(optimizer).__name__}) has trained before, and its state belongs to whole weights. "
            f"Give a new optimizer, or a function that creates it, or {WHOLE}."
        )
    return faults
