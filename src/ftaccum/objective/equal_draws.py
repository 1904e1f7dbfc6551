"""Forward passes in which all rows draw the same random numbers, whichever other rows are in the batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..runtime.state_guards import preserve_rng, seed_all
from .item_counts import Batch, rows_of

_BY_SIZE = {torch.rand, torch.randn}
_LIKE = {torch.rand_like, torch.randn_like}


class _EqualRows(TorchFunctionMode):
    """A mode that draws random numbers for one row and repeats them for all rows."""

    def __init__(self, n_rows: int) -> None:
        super().__init__()
        self._n_rows = n_rows

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _BY_SIZE and args:
            size = tuple(args[0]) if isinstance(args[0], list | tuple) else args
            if self._has_rows(size):
                return function((1, *size[1:]), **kwargs).expand(size).clone()
        if function in _LIKE and args and self._has_rows(args[0].shape):
            return function(args[0][:1], *args[1:], **kwargs).expand_as(args[0]).clone()
        return function(*args, **kwargs)

    def _has_rows(self, size: Sequence[int]) -> bool:
        return len(size) > 1 and size[0] == self._n_rows


@contextmanager
def equal_draws(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Give all rows of a batch the same random draws in every pass in eval mode, and restore the generators afterwards.

    Models that mask at random even in eval mode would otherwise have a different loss in every pass.
    """
    if any(module.training for module in model.modules()):
        yield
        return
    with preserve_rng(), _EqualRows(rows_of(batch)):
        seed_all(0)
        yield
