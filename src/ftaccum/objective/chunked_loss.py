"""The cross entropy of many labelled positions, which never holds the logits of all of them.

Shape suffixes: N positions, H hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Positions whose logits are computed together. From 256 on, torch's chunked operation takes 0.8 to 1.0 times as long as
# logits and cross entropy, at any chunk size from 128 to 512 (vocabularies of 30,522 and 49,152, one CPU thread).
_CHUNK = 256
# In 16 bits, torch's operation takes 1.6 times as long, and rounds its loss to 16 bits. To compute a chunk's logits
# again in the backward pass takes 1.25 times as long, so chunks are as large as memory reasonably allows.
_BYTES = 2**28  # of the float32 logits of a chunk


def chunked_cross_entropy(head: nn.Module, hidden_NH: Tensor, targets_N: Tensor) -> Tensor | None:
    """Return the mean cross entropy of the logits `head(hidden_NH)`; None if chunks would save nothing.

    Args:
        head: the layer that projects hidden states onto the vocabulary.
    """
    n, weight = len(targets_N), head.weight
    assert isinstance(weight, Tensor), "an output embedding has a weight"
    if type(head) is nn.Linear and _suits_torch(weight, hidden_NH):
        if n <= _CHUNK:
            return None
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=_CHUNK, chunking_method=None)
        return F.linear_cross_entropy(hidden_NH, weight, targets_N, linear_bias=head.bias, options=options)
    size = max(1, _BYTES // (4 * len(weight)))
    if n <= size:
        return None
    sums = [
        checkpoint(_summed, head, *chunk, use_reentrant=False)
        for chunk in zip(hidden_NH.split(size), targets_N.split(size), strict=True)
    ]
    return torch.stack(sums).sum() / n


def _suits_torch(weight: Tensor, hidden_NH: Tensor) -> bool:
    """Return whether torch has a chunked operation, and computes it in at least 32 bits."""
    is_wide = hidden_NH.dtype == weight.dtype and hidden_NH.dtype.itemsize >= 4
    # The operation came with torch 2.13.
    return is_wide and hasattr(F, "linear_cross_entropy") and not torch.is_autocast_enabled(hidden_NH.device.type)


def _summed(head: nn.Module, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
    logits_NV: Tensor = head(hidden_NH[None])[0]  # with as many dimensions as in the model
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(logits_NV, targets_N, reduction="sum")
