"""Gradients of large linear layers, added to the window's sum by the matrix product that computes them.

Shape suffixes: R rows of the matrix product (all positions of a micro-batch), I inputs and O outputs of the layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..gradient_hooks import sees_gradient
from ..model_context import is_compiled

# Smallest weight, in bytes, whose gradients are added in place. glibc maps each allocation of this size anew, and
# mapping the pages costs more than the addition.
_LEAST_BYTES = 2**25


class InPlaceGradients:
    """The gradients of large linear layers, such as output embeddings, added to `weight.grad` in place.

    Autograd writes the gradient of a pass to new memory and then adds it to the sum. The product of two matrices can
    add to its result at no cost. On a CPU, for a table of 30,522 × 384 numbers, this saves 48 of 302 ms in a pass of
    masked language modelling at labelled positions (`scripts/profile_passes.py`). It also saves the memory of one
    gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find the large linear layers of a model on a CPU; none in a compiled model.

        Layers on accelerators are left out, because no gain is known there.
        """
        modules = [] if is_compiled(model) else list(model.modules())
        self._layers = [m for m in modules if type(m) is nn.Linear and m.weight.nbytes >= _LEAST_BYTES]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Make backward passes add to gradients that exist; the first gradient of a window comes from autograd."""
        layers = [layer for layer in self._layers if _can_add(layer)]
        for layer in layers:
            layer.forward = partial(_linear, layer)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)


def _can_add(layer: nn.Linear) -> bool:
    weight = layer._parameters.get("weight")  # a pruned or normalized layer computes its weight
    if weight is None or weight.is_complex() or "forward" in vars(layer):
        return False
    return type(weight) is nn.Parameter and weight.device.type == "cpu" and not sees_gradient(weight)


def _linear(layer: nn.Linear, input: Tensor) -> Tensor:  # the name in `forward`
    """Run a linear layer, as its own `forward` does."""
    given, weight, bias = input, layer.weight, layer.bias
    is_plain = type(given) is Tensor and given.dtype == weight.dtype and given.device == weight.device
    is_transformed = torch._C._are_functorch_transforms_active()
    if not is_plain or is_transformed or not weight.requires_grad or torch.is_autocast_enabled("cpu"):
        return functional.linear(given, weight, bias)
    result: Tensor = _Linear.apply(given, weight, bias)
    return result


class _Linear(torch.autograd.Function):
    """A linear layer whose backward pass adds the gradient of its weight to `weight.grad`, if there is one."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: nn.Parameter, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(given, weight)
        result = functional.linear(given, weight, bias)
        # Autograd refuses to change a view from inside a function in place, as `relu_` does with its input.
        return torch.ops.aten._unsafe_view(result, result.shape) if result._is_view() else result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        given, weight = ctx.saved_tensors
        gradient = gradients[0]
        of_input, of_weight, of_bias = ctx.needs_input_grad
        rows_RO, rows_RI = gradient.reshape(-1, gradient.shape[-1]), given.reshape(-1, given.shape[-1])
        return (
            gradient @ weight if of_input else None,
            _added(ctx, weight, rows_RO, rows_RI) if of_weight else None,
            rows_RO.sum(0) if of_bias else None,
        )


def _added(ctx: Any, weight: nn.Parameter, rows_RO: Tensor, rows_RI: Tensor) -> Tensor | None:
    """Add the gradient of a weight to the sum in `weight.grad`, or return it if autograd has to."""
    total = weight.grad
    has_sum = total is not None and total.layout is torch.strided and total.dtype == rows_RI.dtype
    is_plain = has_sum and not torch.is_grad_enabled() and not sees_gradient(weight)  # a pass may register hooks
    if not is_plain or not _accumulates(ctx.next_functions[1][0]):
        return rows_RO.t() @ rows_RI
    assert total is not None
    total.addmm_(rows_RO.t(), rows_RI)
    return None


def _accumulates(node: Any) -> bool:
    """Return whether this backward pass adds to `grad`: `torch.autograd.grad` in a forward pass must not.

    Args:
        node: the `AccumulateGrad` node of the weight.
    """
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # it returns the gradient of this weight
        return False
