"""Estimate the memory of a process in training, from a model on the meta device."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...runtime.model_traits import stores_attention_matrices
from ...runtime.sharding.units import candidate_units
from ...settings.recipe import Recipe
from ...training.parameter_groups import parameter_groups
from .activations import Activations, BlockShape, estimate_activations, logits_bytes
from .optimizer_states import state_bytes

_FLOAT32, _HALF = 4, 2  # bytes of a number


@dataclass(frozen=True, kw_only=True)
class MemorySetup:
    """The settings of a run that its memory depends on.

    Attributes:
        num_processes: the processes, each with its own device.
        tokens: the positions of a micro-batch on one process: rows × tokens of a row.
        optimizer: the name of the optimizer.
        autocast: whether forward passes run under autocast to 16 bits.
        gradient_checkpointing, accumulate_in_fp32, sync: the settings of these names.
    """

    num_processes: int = 1
    tokens: int = 1
    optimizer: str = "adamw"
    autocast: bool = False
    gradient_checkpointing: bool = False
    accumulate_in_fp32: bool = False
    sync: str = "each"


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """The bytes that the fullest process holds at the peak of a backward pass that is not the first of its window.

    Attributes:
        weights, buffers: the model; tied weights count once. Exact.
        gradients: the gradients in the type of the weights. Exact.
        gradient_sums: float32 sums of the gradients of 16-bit weights. Exact. Whole copies add each gradient at once,
            so that `gradients` is 0; with FSDP2 `gradients` is what one pass adds.
        optimizer_states: the moments and other states of the optimizer. Exact for torch's optimizers.
        ddp_buckets: the copies of all gradients that DDP sends.
        gathered_weights: with FSDP2, whole weights: those outside of blocks, the largest block, and the next one, which
            FSDP2 gathers ahead.
        whole_gradients: with FSDP2, the gradient of the largest unit, and its copy in float32 that is sent; with
            `sync="last"` also whole float32 gradients of all weights.
        autocast_copies: with whole copies, the 16-bit copies of the matrices of linear layers, which autocast keeps to
            the end of the forward pass, and autograd for the backward pass. With FSDP2 they are made again instead.
        activations: what autograd keeps, by a formula; None if it does not hold for the model.
        logits: the logits of a language model in float32, and what the loss makes of them.
    """

    weights: int
    buffers: int
    gradients: int
    gradient_sums: int
    optimizer_states: int
    ddp_buckets: int = 0
    gathered_weights: int = 0
    whole_gradients: int = 0
    autocast_copies: int = 0
    activations: int | None = None
    logits: int = 0

    @property
    def total(self) -> int:
        """The sum, without activations if they are unknown."""
        return sum(getattr(self, f.name) or 0 for f in fields(self))


def estimate_memory(model: Any, setup: MemorySetup, *, sharded: bool) -> MemoryEstimate:
    """Estimate the memory of a process.

    Args:
        model: a model of Transformers, usually on the meta device.
        setup: the settings of the run.
        sharded: whether FSDP2 shards weights, gradients and optimizer state over the processes. Otherwise each process
            has a whole copy, which DDP syncs if there are several.
    """
    p = setup.num_processes if sharded else 1
    weights = list(model.parameters())
    sums_in_fp32 = {w for w in weights if _is_narrow(w) and (sharded or setup.accumulate_in_fp32)}
    gradients = sum(_held(w, p) * w.element_size() for w in weights if sharded or w not in sums_in_fp32)
    common = {
        "weights": sum(_held(w, p) * w.element_size() for w in weights),
        "buffers": sum(b.numel() * b.element_size() for b in model.buffers()),
        "gradients": gradients,
        "gradient_sums": sum(_held(w, p) * _FLOAT32 for w in sums_in_fp32),
        "optimizer_states": _states(model, setup.optimizer, p),
        "activations": activations_of(model, setup),
        "logits": _logits(model, setup),
    }
    if sharded:
        return MemoryEstimate(**common, **_sharding_costs(model, setup))
    buckets = gradients if setup.num_processes > 1 and not sums_in_fp32 else 0
    copies = _HALF * sum(map(Tensor.numel, _autocast_weights(model))) if setup.autocast else 0
    return MemoryEstimate(**common, ddp_buckets=buckets, autocast_copies=copies)


def activations_of(model: Any, setup: MemorySetup) -> int | None:
    """Return the bytes of activations, or None if the formula does not hold for the model."""
    try:
        found = kept_of_blocks(model, setup)
    except ValueError:
        return None
    return found.total(checkpointing=setup.gradient_checkpointing)


def kept_of_blocks(model: Any, setup: MemorySetup) -> Activations:
    """Return the activations of a model by part.

    Raises:
        ValueError: if the formula does not hold for the model. The message is a clause that says why.
    """
    blocks = list(candidate_units(model).values())
    shape = BlockShape.of(model.config, blocks)
    if stores_attention_matrices(model):
        raise ValueError("its attention stores matrices of tokens × tokens, and the formula is for fused attention")
    is_language_model = model.get_output_embeddings() is not None
    return estimate_activations(
        shape, len(blocks), setup.tokens, _weight_size(model), autocast=setup.autocast,
        is_language_model=is_language_model,
    )  # fmt: skip


def _held(weight: Tensor, num_processes: int) -> int:
    """Return how many numbers of a weight the fullest process holds. FSDP2 cuts the first dimension in equal parts."""
    return math.prod(_shard(weight, num_processes))


def _shard(weight: Tensor, num_processes: int) -> tuple[int, ...]:
    if not weight.ndim:
        return ()
    first, *others = weight.shape
    return (math.ceil(first / num_processes), *others)


def _is_narrow(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.element_size() < _FLOAT32


def _weight_size(model: nn.Module) -> int:
    return max((p.element_size() for p in model.parameters()), default=_FLOAT32)


def _states(model: nn.Module, optimizer: str, num_processes: int) -> int:
    groups = parameter_groups(model, Recipe(optimizer=optimizer))
    return sum(
        state_bytes(optimizer, _shard(w, num_processes), w.element_size(), is_hidden=group.is_hidden)
        for group in groups
        for w in group.params
    )


def _logits(model: Any, setup: MemorySetup) -> int:
    layer = model.get_output_embeddings()
    if layer is None:
        return 0
    return logits_bytes(layer.weight.shape[0], setup.tokens, _HALF if setup.autocast else _weight_size(model))


def _sharding_costs(model: nn.Module, setup: MemorySetup) -> dict[str, int]:
    """Return the bytes that FSDP2 needs besides the shards. It gathers weights in their own type."""
    size = _weight_size(model)
    blocks = [sum(map(Tensor.numel, block.parameters())) for block in candidate_units(model).values()]
    whole = sum(map(Tensor.numel, model.parameters()))
    root, largest = whole - sum(blocks), max(blocks, default=0)
    gradients = max(root, largest) * (size + _FLOAT32)
    return {
        "gathered_weights": (root + min(2, len(blocks)) * largest) * size,
        "whole_gradients": gradients + (whole * _FLOAT32 if setup.sync == "last" else 0),
    }


def _autocast_weights(model: nn.Module) -> Iterator[Tensor]:
    """Return the float32 weights that autocast copies: those of linear layers."""
    found = (m.weight for m in model.modules() if isinstance(m, nn.Linear | Conv1D))
    return iter(dict.fromkeys(w for w in found if w.element_size() == _FLOAT32))
