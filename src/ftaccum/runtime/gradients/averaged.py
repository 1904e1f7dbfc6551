"""Gradients that processes average themselves, once after all passes of a window."""

from collections.abc import Sequence

from torch import nn

from ..process_group import ProcessGroup
from .plain import GradientStrategy
from .process_average import average_gradients


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
