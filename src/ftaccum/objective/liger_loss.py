"""The cross entropy of a linear layer's logits by the kernels of Liger, which never hold all logits.

Shape suffixes: N positions, H hidden size, V vocabulary.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..runtime.log import logger

_DEVICES = ("cuda",)  # AMD's devices have this name, too


def liger_loss(hidden_NH: Tensor, targets_N: Tensor, layer: nn.Linear, size: int) -> Tensor | None:
    """Return the mean cross entropy of the logits `layer(hidden_NH)`, computed in chunks.

    The forward pass also computes the gradient, and sums that of the weight in float32. The backward pass scales it in
    place, so it may run only once. Each pass waits for the device.

    Args:
        targets_N: the label of each position.
        size: roughly the number of positions in a chunk. A chunk has at least N·H/V of them, so that its logits take
            about as much memory as the hidden states.

    Returns:
        The loss; None if Liger cannot run here, or would lose a gradient or its precision.
    """
    device, weight_VH = hidden_NH.device, layer.weight
    is_plain = type(weight_VH) in (Tensor, nn.Parameter)  # weights of a few bits have other types
    # Without a gradient of the hidden states, Liger computes none of the weight either.
    has_gradients = hidden_NH.requires_grad or not torch.is_grad_enabled()
    dtype = _type_of_logits(hidden_NH, weight_VH)
    if device.type not in _DEVICES or not (is_plain and has_gradients) or dtype is None:
        return None
    if (fused := _function(device)) is None:
        return None
    # With a label out of range, the kernel would read other memory. This lookup fails, as that of other losses does.
    weight_VH.detach()[:, 0].gather(0, targets_N)
    logits_per_input = max(1, size * len(weight_VH) // hidden_NH.numel())
    given_NH, given_VH = hidden_NH.to(dtype), weight_VH.to(dtype)  # once, instead of in each chunk
    bias_V = None if layer.bias is None else layer.bias.to(dtype)
    with torch.autocast(device.type, enabled=False):
        return fused(given_NH, given_VH, targets_N, bias_V, accum_dtype=torch.float32, chunk_mem_const=logits_per_input)


def _type_of_logits(hidden_NH: Tensor, weight_VH: Tensor) -> torch.dtype | None:
    """Return the type that the layer computes in; None for those that Liger does not suit.

    Float16 needs a loss scale, which would come after the gradient of the logits was rounded. Float64 would be rounded
    to float32.
    """
    kind, types = hidden_NH.device.type, {hidden_NH.dtype, weight_VH.dtype}
    if torch.is_autocast_enabled(kind) and torch.float64 not in types:
        types = {torch.get_autocast_dtype(kind)}
    return types.pop() if types in ({torch.float32}, {torch.bfloat16}) else None


@functools.cache
def _function(device: torch.device) -> Callable[..., Tensor] | None:
    """Return Liger's function; None if it is not installed, or fails on a device, as without Triton's C compiler."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

        hidden, weight = torch.zeros(2, 2, 2, device=device)
        targets = torch.zeros(2, dtype=torch.long, device=device)
        fused(hidden, weight, targets, accum_dtype=torch.float32, chunk_mem_const=1)
    except ModuleNotFoundError:
        return None
    except Exception as error:  # versions differ in their options, and Triton raises many errors
        logger.debug(f"Liger's cross entropy does not run here, so others are used: {error}")
        return None
    return fused
