"""The cross entropy of many labelled positions, which never holds the logits of all of them.

Shape suffixes: N positions, H hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .liger_loss import liger_loss
from .normalizer import widened

# In float32, torch's chunked operation takes 0.9 to 1.0 times as long as logits and cross entropy. In bf16 it takes 1.9
# to 2.5 times as long, and rounds its loss to 16 bits. Logits that the backward pass computes again take 1.2 to 1.3
# times as long, so these chunks are as large as memory reasonably allows (scripts/bench_chunks.py, one CPU thread). If
# the layers are checkpointed, logits are most of what is in memory, and time is less important.
_POSITIONS = 256
_BYTES, _BYTES_WITH_CHECKPOINTS = 2**28, 2**26  # of a chunk's logits in float32


class ChunkedLoss:
    """Computes the mean cross entropy of the logits `head(hidden_NH)` in chunks."""

    def __init__(self, head: nn.Module, n_positions: int | None = None, *, saves_memory: bool = False) -> None:
        """Args:
        head: the layer that projects hidden states onto the vocabulary, before training: its `forward` may be
            replaced later.
        n_positions: the positions of a chunk; None to choose it.
        saves_memory: whether to choose small chunks, at the cost of time.
        """
        self._head, self._n_positions = head, n_positions
        self._bytes = _BYTES_WITH_CHECKPOINTS if saves_memory else _BYTES
        self._linear = head if type(head) is nn.Linear and "forward" not in vars(head) else None

    def __call__(self, hidden_NH: Tensor, targets_N: Tensor) -> Tensor | None:
        """Return the loss; None if chunks would save nothing, or the size of the vocabulary is unknown.

        Args:
            targets_N: the label of each position.
        """
        n, weight = len(targets_N), getattr(self._head, "weight", None)
        if not isinstance(weight, Tensor):
            return None
        size = self._n_positions or max(1, self._bytes // (4 * _vocabulary(self._head, weight)))
        if self._linear is not None:
            if n > size and (loss := liger_loss(hidden_NH, targets_N, self._linear, size)) is not None:
                return loss
            if _suits_torch(weight, hidden_NH):
                n_of_torch = self._n_positions or _POSITIONS
                if n <= n_of_torch:
                    return None
                options = nn.LinearCrossEntropyOptions(batch_chunk_size=n_of_torch, chunking_method=None)
                bias = self._linear.bias
                return F.linear_cross_entropy(hidden_NH, weight, targets_N, linear_bias=bias, options=options)
        if n <= size:
            return None
        sums = [
            checkpoint(_summed, self._head, *chunk, use_reentrant=False)
            for chunk in zip(hidden_NH.split(size), targets_N.split(size), strict=True)
        ]
        return torch.stack(sums).sum() / n


def _suits_torch(weight: Tensor, hidden_NH: Tensor) -> bool:
    """Return whether torch has a chunked operation, and computes it in at least 32 bits."""
    is_wide = hidden_NH.dtype == weight.dtype and hidden_NH.dtype.itemsize >= 4
    # The operation came with torch 2.13.
    return is_wide and hasattr(F, "linear_cross_entropy") and not torch.is_autocast_enabled(hidden_NH.device.type)


def _vocabulary(head: nn.Module, weight: Tensor) -> int:
    size = getattr(head, "out_features", len(weight))  # weights of 4 bits are packed
    return size if isinstance(size, int) else len(weight)


def _summed(head: nn.Module, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
    logits_NV: Tensor = head(hidden_NH[None])[0]  # with as many dimensions as in the model
    return F.cross_entropy(widened(logits_NV), targets_N, reduction="sum")
