"""Gradients that processes average themselves, once after all passes of a window."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn

from ..process_group import ProcessGroup
from .plain import GradientStrategy


class AveragedGradients(GradientStrategy):
    """The sums of a model's gradients in `param.grad`, for a model that runs without DDP and an unknown optimizer.

    No pass communicates. So processes may run unequal numbers of passes, and may use different weights in them.

    Attributes:
        sparse_parameters: the weights of embedding tables that the user has made sparse.
    """

    reduces_after_passes = True

    def __init__(self, *modules: nn.Module) -> None:
        """Args:
        modules: the model that runs, without DDP, and the modules that compute the loss. Their parameters may be frozen
            and unfrozen between windows.
        """
        self._modules = modules
        tables = (
            module
            for each in modules
            for module in each.modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        )
        self.sparse_parameters = {table.weight for table in tables if table.sparse}

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        found = (p for module in self._modules for p in module.parameters() if p.requires_grad)
        return list(dict.fromkeys(found))

    def reduce(self, process_group: ProcessGroup) -> None:
        """Average the gradients over all processes, and coalesce sparse ones."""
        parameters = self.parameters
        if process_group.is_single:
            super().reduce(process_group)
            return
        sparse = process_group.any_of(p.grad is not None and p.grad.is_sparse for p in parameters)
        for p in parameters:
            if p.grad is not None and p.grad.is_sparse:
                p.grad = p.grad.to_dense()
        average_gradients(parameters, process_group)
        for p, is_sparse in zip(parameters, sparse, strict=True):
            if is_sparse and p in self.sparse_parameters and p.grad is not None:
                p.grad = p.grad.to_sparse(1)


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
