"""The average of dense gradients over all processes."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from ..process_group import ProcessGroup


def average_gradients(parameters: Sequence[Tensor], process_group: ProcessGroup) -> None:
    """Average the dense gradients of parameters over all processes.

    A parameter without a gradient on any process gets none, so that no optimizer decays it. If only some processes have
    a gradient, it counts as 0 on the others.
    """
    if process_group.is_single:
        return
    for p, used in zip(parameters, process_group.any_of(p.grad is not None for p in parameters), strict=True):
        if used and p.grad is None:
            p.grad = dense_zeros(p)
    gradients = [p.grad for p in parameters if p.grad is not None]
    sums = [gradient.div_(process_group.size).contiguous() for gradient in gradients]  # 16-bit sums could overflow
    for under_way in [distributed.all_reduce(total, async_op=True) for total in sums]:
        under_way.wait()
    for gradient, total in zip(gradients, sums, strict=True):
        if total is not gradient:
            gradient.copy_(total)


def dense_zeros(parameter: Tensor) -> Tensor:
    """Return contiguous zeros of a parameter's shape, also for a stand-in that takes no memory."""
    return torch.zeros_like(parameter, memory_format=torch.contiguous_format)
