"""A guard against indices out of range in forward passes that try out a model."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# An index tensor, and the range that its numbers must be in: from the first number to below the second.
_Indices: TypeAlias = tuple[Tensor, int, int]


class IndexGuard(TorchDispatchMode):
    """A mode that raises IndexError for a lookup out of range before it reaches a kernel.

    On a CPU, the kernel would raise it anyway. On a GPU, an assertion would fail in the kernel, and the process could
    not use the device any more.
    """

    supports_higher_order_operators = True  # such as flex attention

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for indices, lowest, end in _INDICES_OF.get(operation, _none)(*args):
            if bool(((indices < lowest) | (indices >= end)).any()):
                raise IndexError(f"An index is out of range in {operation}: it must be between {lowest} and {end - 1}.")
        return operation(*args, **(kwargs or {}))


def _none(*_: Any) -> Iterator[_Indices]:
    yield from ()


def _of_embedding(table: Tensor, indices: Tensor, *_: Any) -> Iterator[_Indices]:
    yield indices, 0, len(table)


def _of_dimension(values: Tensor, dim: int, indices: Tensor, *_: Any) -> Iterator[_Indices]:
    yield indices, 0, values.shape[dim] if values.ndim else 1


def _of_brackets(values: Tensor, indices: list[Tensor | None]) -> Iterator[_Indices]:
    dim = 0
    for index in indices:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        if index is not None and not is_mask:
            yield index, -values.shape[dim], values.shape[dim]
        dim += index.ndim if index is not None and is_mask else 1


def _of_classes(scores: Tensor, labels: Tensor, _: Any, __: int, ignore_index: int) -> Iterator[_Indices]:
    yield labels[labels != ignore_index], 0, scores.shape[min(1, scores.ndim - 1)]


_aten = torch.ops.aten
_INDICES_OF: dict[Any, Callable[..., Iterator[_Indices]]] = {
    _aten.embedding.default: _of_embedding,
    _aten.gather.default: _of_dimension,
    _aten.index_select.default: _of_dimension,
    _aten.index.Tensor: _of_brackets,
    _aten.nll_loss_forward.default: _of_classes,
    _aten.nll_loss2d_forward.default: _of_classes,
}
