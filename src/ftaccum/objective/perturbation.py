"""Temporary changes of a model's weights for a measurement: noise, so that rows differ in loss, and wider types."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from ..runtime.model_traits import output_embeddings
from ..runtime.model_wrapper import model_to_save
from ..runtime.state_guards import cast_tensors, preserve_gradients
from .item_counts import Batch

# The numbers to draw at most; larger weights repeat them. As the number is prime, rows get different ones.
_DRAWN = (1 << 20) + 7


@contextmanager
def perturb_head(model: nn.Module) -> Iterator[None]:
    """Add noise to the model's last weights, and restore them afterwards.

    The right way to count does not depend on the weights. But it shows only if rows differ in loss, and with a new head
    they hardly do.
    """
    weight = _last_weight(model)
    # This makes logits of a few units, because the inputs of a last layer are about 1 each, or normalized to that.
    scale = 1.0 if weight is None else 3 / math.sqrt(weight.numel() / weight.shape[0])
    with _noise([] if weight is None else [weight], scale):
        yield


@contextmanager
def float32_weights(*modules: nn.Module) -> Iterator[Callable[[Batch], Batch]]:
    """Hold 16-bit weights and buffers in float32, and compute float32 products without shortcuts (TF32, bf16).

    Losses that are rounded to 16 bits cannot tell two ways to count apart: in bfloat16, the right count of SmolLM2's
    chats left a difference of 5e-5, more than is tolerated, and the wrong ones 3e-3 to 5e-3. Choosing in 16 bits would
    save no pass in float32, since the passes that choose a count also confirm it.

    Yields:
        A function that converts the 16-bit tensors of a batch to float32 too, if any weights were converted.
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


@contextmanager
def float64_weights(*modules: nn.Module) -> Iterator[Callable[[Batch], Batch]]:
    """Hold floating-point weights and buffers in float64, without gradients, and restore them afterwards.

    Yields:
        A function that converts the floating-point tensors of a batch to float64 too.
    """
    all_modules = nn.ModuleList(modules)
    tensors = [t for t in (*all_modules.parameters(), *all_modules.buffers()) if t.is_floating_point()]
    with preserve_gradients(all_modules), cast_tensors(tensors, torch.float64):  # a gradient has the type of its weight
        yield lambda batch: recursively_apply(lambda t: t.double(), batch, test_type=_is_real)


def has_narrow_weights(model: nn.Module) -> bool:
    """Return whether `float32_weights` would convert weights of a model."""
    return any(map(_is_narrow, model.parameters()))


def perturb_norms(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Add noise to the scales and shifts of these modules, and restore them afterwards.

    Otherwise a norm whose scale is 0, as the last one of a new residual branch has, would not affect the loss, although
    it has a gradient.
    """
    return _noise(
        [p for module in modules for p in module.parameters(recurse=False) if p.ndim == 1 and p.is_floating_point()]
    )


@contextmanager
def _noise(weights: Sequence[Tensor], scale: float = 1.0) -> Iterator[None]:
    before = [w.detach().clone() for w in weights]
    draw = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for w in weights:
                _add_noise(w, draw, scale)
        yield
    finally:
        with torch.no_grad():
            for w, values in zip(weights, before, strict=True):
                w.copy_(values)


def _add_noise(weight: Tensor, draw: torch.Generator, scale: float) -> None:
    if weight.numel() <= _DRAWN or not weight.is_contiguous():
        weight.add_((torch.randn(weight.shape, generator=draw) * scale).to(weight.device, weight.dtype))
        return
    noise = (torch.randn(_DRAWN, generator=draw) * scale).to(weight.device, weight.dtype)
    flat = weight.view(-1)
    n_whole = len(flat) // _DRAWN * _DRAWN
    flat[:n_whole].view(-1, _DRAWN).add_(noise)
    flat[n_whole:].add_(noise[: len(flat) - n_whole])


def _widened(batch: Batch) -> Batch:
    return recursively_apply(lambda t: t.float(), batch, test_type=_is_narrow)


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _last_weight(model: Any) -> Tensor | None:
    model = model_to_save(model)  # after which a wrapper may have a teacher
    weight = getattr(output_embeddings(model), "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight
    candidates = [p for p in model.parameters() if p.ndim >= 2 and p.is_floating_point() and p.numel()]
    return candidates[-1] if candidates else None
