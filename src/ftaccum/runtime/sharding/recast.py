"""Autocast on gathered weights, without keeping a whole 16-bit copy of each until the backward pass.

Autocast copies the weight of each linear layer to 16 bits, and autograd saves the copy for the backward pass. Together,
these copies are a whole model. But the weights of a unit are gathered again for its backward pass, so a copy can be
made again from them.
"""

from collections.abc import Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_COPY, _TRANSPOSE = "ToCopyBackward0", "TBackward0"


@dataclass(frozen=True)
class _Copy:
    """A copy of a weight to another type, and whether it is transposed."""

    weight: Tensor
    dtype: torch.dtype
    is_transposed: bool


class RecastWeights:
    """Saves a reference to a gathered weight in place of its 16-bit copy."""

    def __init__(self, weights: Set[int]) -> None:
        """Args:
        weights: the ids of the gathered weights, which may grow.
        """
        self._weights = weights

    def saved(self) -> AbstractContextManager[Any]:
        """Return the context for forward passes."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _Copy:
        node: Any = tensor.grad_fn
        is_transposed = node is not None and node.name() == _TRANSPOSE
        if is_transposed:
            node = node.next_functions[0][0]
        if node is None or node.name() != _COPY:
            return tensor
        weight = getattr(node.next_functions[0][0], "variable", None)
        if not isinstance(weight, nn.Parameter) or id(weight) not in self._weights:
            return tensor
        return _Copy(weight, tensor.dtype, is_transposed)


def _unpack(saved: Tensor | _Copy) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    copy = saved.weight.detach().to(saved.dtype)
    return copy.t() if saved.is_transposed else copy
