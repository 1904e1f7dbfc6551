"""The nodes of an autograd graph, and its leaves: the tensors that get a gradient in its backward pass."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


def nodes_of(loss: Tensor) -> Iterator[Any]:
    """Yield the nodes of the graph of a loss, each once."""
    waiting: list[Any] = [] if loss.grad_fn is None else [loss.grad_fn]
    known = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in known:
                known.add(following)
                waiting.append(following)


def leaves_of(loss: Tensor) -> list[Tensor]:
    """Return the tensors that the backward pass of a loss accumulates a gradient in."""
    if loss.grad_fn is None:
        return [loss] if loss.requires_grad else []
    variables = (getattr(node, "variable", None) for node in nodes_of(loss))
    return [leaf for leaf in variables if isinstance(leaf, Tensor)]


def leaves_besides(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the leaves of a loss that are none of these parameters."""
    known = {id(p) for p in parameters}
    return [leaf for leaf in leaves_of(loss) if id(leaf) not in known]
