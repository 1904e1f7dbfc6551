"""A model's weights, for the time of a measurement: such that rows differ in loss, and without rounding to 16 bits."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from ..runtime.state_guards import cast_tensors
from .item_counts import Batch


@contextmanager
def perturb_head(model: nn.Module) -> Iterator[None]:
    """Gives the model's last weights noise, and takes it away again.

    Which way to count is right does not depend on the weights; but rows must differ in loss for it to show, and under
    a new head they hardly do.
    """
    weight = _last_weight(model)
    if weight is None:
        yield
        return
    before = weight.detach().clone()
    # Logits of a few units: the inputs of a last layer are about 1 each, or normalised to it.
    scale = 3 / math.sqrt(weight.numel() / weight.shape[0])
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * scale
    try:
        with torch.no_grad():
            weight.add_(noise.to(weight.device, weight.dtype))
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


@contextmanager
def float32_weights(*modules: nn.Module) -> Iterator[Callable[[Batch], Batch]]:
    """Models of 16-bit weights in float32, and float32 products without shortcuts (TF32, bf16), for the time being.

    Rounded to 16 bits, the losses of two ways to count cannot be told apart.

    Yields:
        What puts the 16-bit numbers of a batch in float32 as well, where it does so with the weights.
    """
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers()) if _is_narrow(t)]
    products = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with cast_tensors(tensors, torch.float32):
            yield _widened if tensors else lambda batch: batch
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def has_narrow_weights(model: nn.Module) -> bool:
    """Whether `float32_weights` has something to do."""
    return any(map(_is_narrow, model.parameters()))


@contextmanager
def perturb_norms(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Gives the scales and shifts of these modules noise, and takes it away again: a norm whose scale is 0, as the last
    of a new residual branch is, has a gradient but no say in the loss."""
    weights = [
        p for module in modules for p in module.parameters(recurse=False) if p.ndim == 1 and p.is_floating_point()
    ]
    before = [p.detach().clone() for p in weights]
    draw = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in weights:
                p.add_(torch.randn(p.shape, generator=draw).to(p.device, p.dtype))
        yield
    finally:
        with torch.no_grad():
            for p, values in zip(weights, before, strict=True):
                p.copy_(values)


def _widened(batch: Batch) -> Batch:
    return recursively_apply(lambda t: t.float(), batch, test_type=_is_narrow)


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)


def _last_weight(model: Any) -> Tensor | None:
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    weight = getattr(head, "weight", None)
    candidates = [p for p in model.parameters() if p.ndim >= 2 and p.is_floating_point() and p.numel()]
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight
    return candidates[-1] if candidates else None
