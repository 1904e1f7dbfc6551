"""Gather tensors for a Trainer's own metrics from processes whose micro-batches have unequal numbers of rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather, recursively_apply
from torch import Tensor

from ...runtime.temporary_attribute import temporary_attribute


@contextmanager
def gathering(accelerator: Accelerator, function: Callable[[Any], Any]) -> Iterator[None]:
    """Make `accelerator.gather` and `gather_for_metrics` call another function until exit."""

    def gather_instead(found: Any, **_: Any) -> Any:
        return function(found)

    with (
        temporary_attribute(accelerator, "gather", gather_instead),
        temporary_attribute(accelerator, "gather_for_metrics", gather_instead),
    ):
        yield


def gather_uneven(found: Any) -> Any:
    """Concatenate tensors of all processes, which may have unequal numbers of rows; stack numbers."""
    return recursively_apply(_gather_rows, found)


def _gather_rows(tensor: Tensor) -> Tensor:
    if not tensor.ndim:
        return gather(tensor)
    n_rows = gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    filled = tensor.new_zeros(max(n_rows), *tensor.shape[1:])
    filled[: len(tensor)] = tensor
    parts = gather(filled).split(max(n_rows)) if max(n_rows) else [filled]
    return torch.cat([part[:n] for part, n in zip(parts, n_rows, strict=False)])
