"""The hooks of parameters on their gradients."""

import functools
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .module_attributes import has_hooks


def gradient_hooks(model: nn.Module) -> list[str]:
    """Return the names of the parameters with hooks that run after a gradient is accumulated."""
    return [name for name, p in model.named_parameters() if p._post_accumulate_grad_hooks]


@contextmanager
def suspend_gradient_hooks(model: nn.Module) -> Iterator[None]:
    """Remove hooks that run after a gradient is accumulated (some step an optimizer), and restore them on exit."""
    with _emptied(p._post_accumulate_grad_hooks for p in model.parameters()):
        yield


@contextmanager
def suspend_tensor_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Remove hooks that change a gradient before it is accumulated (`register_hook`), and restore them on exit."""
    with _emptied(tensor._backward_hooks for tensor in tensors):
        yield


@contextmanager
def _emptied(hooks: Iterable[MutableMapping[Any, Any] | None]) -> Iterator[None]:
    found = [each for each in hooks if each]
    before = [dict(each) for each in found]
    for each in found:
        each.clear()
    try:
        yield
    finally:
        for each, kept in zip(found, before, strict=True):
            each.update(kept)


class AnyLayoutHook(functools.partial[None]):
    """A hook that takes sparse gradients as well as dense ones."""


def needs_dense_gradient(tensor: Tensor) -> bool:
    """Return whether hooks see the gradient of a tensor, and may expect a dense one."""
    return bool(n_hooks(tensor))


def n_hooks(tensor: Tensor) -> int:
    """Return the number of hooks that see the gradient of a tensor, without those that take sparse gradients."""
    every = (tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None))
    return sum(not isinstance(hook, AnyLayoutHook) for hooks in every if hooks for hook in hooks.values())


def sees_gradient(tensor: Tensor) -> bool:
    """Return whether hooks see the gradient of a tensor."""
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


def model_has_hooks(model: nn.Module) -> bool:
    """Return whether a module or a parameter has hooks, which may change the results of passes."""
    return any(map(has_hooks, model.modules())) or any(map(sees_gradient, model.parameters()))
