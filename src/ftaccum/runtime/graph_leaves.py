"""The leaves of an autograd graph: the tensors that get a gradient in its backward pass."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def leaves_of(loss: Tensor) -> list[Tensor]:
    """Return the tensors that the backward pass of a loss accumulates a gradient in."""
    if loss.grad_fn is None:
        return [loss] if loss.requires_grad else []
    leaves: list[Tensor] = []
    waiting: list[Any] = [loss.grad_fn]
    known = {loss.grad_fn}
    while waiting:
        node = waiting.pop()
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            leaves.append(leaf)
        new = [following for following, _ in node.next_functions if following is not None and following not in known]
        known.update(new)
        waiting += new
    return leaves


def leaves_besides(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the leaves of a loss that are none of these parameters."""
    known = {id(p) for p in parameters}
    return [leaf for leaf in leaves_of(loss) if id(leaf) not in known]
