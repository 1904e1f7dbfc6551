"""Weights that forward passes write to, such as those of a momentum encoder, found and restored."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_SMALL = 4096  # numbers in a frozen weight whose values are copied, since writes to `.data` do not show


class WrittenWeights:
    """Finds the weights that passes write to: in place, by replacing their data, or by any way if they are small.

    Writes to `.data` in place show in frozen weights of up to 4,096 numbers only.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._before = {
            name: (p, p.data, p._version, p.detach().clone() if _is_small(p) else None)
            for name, p in _weights(modules).items()
        }

    def found(self) -> dict[str, nn.Parameter]:
        """Return the weights that were written to since, by name."""
        return {
            name: p
            for name, (p, data, version, copy) in self._before.items()
            if p.data_ptr() != data.data_ptr() or p._version != version or not (copy is None or torch.equal(p, copy))
        }


@contextmanager
def preserve_weights(*modules: nn.Module) -> Iterator[None]:
    """On exit, restore weights whose data were replaced, small frozen ones, and embedding tables with `max_norm`."""
    before: list[tuple[nn.Parameter, Tensor, Tensor | None]] = []
    normed = {each.weight for each in _inside(modules) if getattr(each, "max_norm", None) is not None}
    for p in _weights(modules).values():
        before.append((p, p.data, p.detach().clone() if _is_small(p) or p in normed else None))
    try:
        yield
    finally:
        for p, data, copy in before:
            if p.data_ptr() != data.data_ptr():
                p.data = data
            if copy is not None and not torch.equal(p, copy):
                p.data.copy_(copy)


def _weights(modules: tuple[nn.Module, ...]) -> Mapping[str, nn.Parameter]:
    """Return the parameters by name, without those of a class of its own, whose data are quantized or sharded."""
    every = {name: p for module in modules for name, p in module.named_parameters()}
    return {name: p for name, p in every.items() if type(p) is nn.Parameter}


def _inside(modules: tuple[nn.Module, ...]) -> Iterator[nn.Module]:
    return (each for module in modules for each in module.modules())


def _is_small(p: Tensor) -> bool:
    return not p.requires_grad and p.numel() <= _SMALL
