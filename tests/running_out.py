"""Models that run out of memory on demand."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from training_passes import is_training_pass


@dataclass
class Limit:
    """The largest number of rows that a training pass may have. Tests can change it."""

    most: int
    passed: bool = False  # whether the current pass exceeds it


class _RunsOutBackwards(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, *__: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def limited(model: nn.Module, most: int, where: str = "forward") -> Limit:
    """Make the model raise the error of a GPU in training passes with more than `most` rows."""
    limit = Limit(most)

    def forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        limit.passed = ids.shape[0] > limit.most and is_training_pass()
        if limit.passed and where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def outputs(_: nn.Module, __: Any, outputs: Any) -> Any:
        if not limit.passed:
            return outputs
        if isinstance(outputs, torch.Tensor):
            return _RunsOutBackwards.apply(outputs)
        outputs.loss = _RunsOutBackwards.apply(outputs.loss)
        return outputs

    model.register_forward_pre_hook(forward, with_kwargs=True)
    model.register_forward_hook(outputs)
    return limit
