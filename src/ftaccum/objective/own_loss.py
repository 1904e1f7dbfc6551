"""The loss and the logits among the outputs of a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, SettingsError

LOSS = "loss"  # the name of the only term of a loss without named terms


class OwnLoss:
    """A reader of a model's own loss, by the name `loss` or by its position among the outputs.

    The position is found on a batch of several rows, where no prediction is a single number, and used for every batch.
    """

    def __init__(self) -> None:
        self._places: dict[bool, int] = {}  # the keys say whether the model is in train mode

    def settle(self, outputs: Any, *, training: bool) -> None:
        """Find the position of the loss among outputs without names.

        Args:
            outputs: the outputs for several rows, computed with gradients.
            training: whether the model was in train mode.

        Raises:
            DataError: if no output may be the loss.
            SettingsError: if several outputs may be the loss.
        """
        if _named(outputs) is None and isinstance(outputs, list | tuple):
            self._places[training] = _place(outputs)

    @property
    def place_in_eval_mode(self) -> int | None:
        """The position of the loss among outputs without names, in eval mode; None if it has a name."""
        return self._places.get(False)

    def __call__(self, outputs: Any, *, training: bool) -> Any:
        """Return the loss.

        Raises:
            DataError: if the outputs hold none.
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


def logits_of(outputs: Any) -> Tensor:
    """Return the logits in a model's outputs: the tensor itself, `.logits`, or the first tensor with dimensions.

    Raises:
        DataError: if there is no such tensor.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        named = outputs.get("logits")
        if named is not None:
            return named
        outputs = [value for key, value in outputs.items() if key != LOSS]
    found = [value for value in outputs if isinstance(value, Tensor) and value.ndim]
    if not found:
        raise DataError("The model's outputs hold no logits. Give a `loss_fn` that uses what they hold.")
    return found[0]


def _named(outputs: Any) -> Any:
    return outputs.get(LOSS) if isinstance(outputs, Mapping) else getattr(outputs, LOSS, None)


def _place(outputs: Sequence[Any]) -> int:
    """Return the index of the output that is the loss.

    Candidates are single numbers; if any has a gradient, only those that do. The loss is the candidate from which no
    other is computed.
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
                f"The model returns several numbers, at positions {', '.join(map(str, numbers))} of its outputs, and "
                "it is unclear which of them is the loss. Return a dict or a dataclass that names it `loss`, or give "
                "a `loss_fn`."
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
