"""Finds the loss in the outputs of a model that computes it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, SettingsError

LOSS = "loss"  # the name of the one term of a loss that has no names


class OwnLoss:
    """Reads a model's own loss: by the name `loss`, or at its place among the outputs.

    A place is settled on a batch of several rows, where no prediction is a single number, and is used for every batch.
    """

    def __init__(self) -> None:
        self._places: dict[bool, int] = {}  # by whether the model is in train mode

    def settle(self, outputs: Any, *, training: bool) -> None:
        """Find the place of the loss among outputs without names.

        Args:
            outputs: of several rows, computed with gradients.
            training: whether the model was in train mode.

        Raises:
            SettingsError: where several outputs may be the loss.
        """
        if _named(outputs) is None and isinstance(outputs, list | tuple):
            self._places[training] = _place(outputs)

    def __call__(self, outputs: Any, *, training: bool) -> Any:
        """Return the loss.

        Raises:
            DataError: where the outputs hold none.
        """
        loss = _named(outputs)
        if loss is None and isinstance(outputs, list | tuple):
            place = self._places[training] if training in self._places else _place(outputs)
            loss = outputs[place] if place < len(outputs) else None
        if loss is None and isinstance(outputs, Tensor) and outputs.numel() == 1:
            loss = outputs
        if loss is None:
            raise _without_loss()
        return loss


def _named(outputs: Any) -> Any:
    return outputs.get(LOSS) if isinstance(outputs, Mapping) else getattr(outputs, LOSS, None)


def _place(outputs: Sequence[Any]) -> int:
    """Return the index of the one number among outputs that may be the loss.

    Of several numbers, those with a gradient are candidates, and of these the one that is computed from the others.
    """
    numbers = [n for n, value in enumerate(outputs) if isinstance(value, Tensor) and value.numel() == 1]
    numbers = [n for n in numbers if outputs[n].requires_grad] or numbers
    numbers = list({id(outputs[n]): n for n in reversed(numbers)}.values())[::-1]
    roots = [n for n in numbers if not any(_is_computed_from(outputs[m], outputs[n]) for m in numbers if m != n)]
    if not numbers:
        raise _without_loss()
    if len(roots) != 1:
        raise SettingsError(
            [
                f"The model returns several numbers, at the places {', '.join(map(str, numbers))} of its outputs, and "
                "it does not show which of them is the loss. Return a dict or a dataclass that names it `loss`, or "
                "give a `loss_fn`."
            ]
        )
    return roots[0]


def _is_computed_from(one: Tensor, other: Tensor) -> bool:
    if not (one.requires_grad and other.requires_grad):
        return False
    (slope,) = torch.autograd.grad(one.sum(), [other], retain_graph=True, allow_unused=True)
    return slope is not None


def _without_loss() -> DataError:
    return DataError(
        "The model was given labels and returned no loss. Give a `loss_fn(outputs, batch)` that computes it."
    )
