"""The tensors of a run that a checkpoint stores by name."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..runtime.optimizers import switches_weights
from .best_weights import passing_of, weights_of


class RunTensors:
    """The tensors of a run that training changes, except the optimizer's state."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any] | None, optimizer: Optimizer) -> None:
        self._model, self._loss_fn, self._optimizer = model, loss_fn, optimizer

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights and persistent buffers of the model."""
        return weights_of(self._model)

    def names(self) -> dict[int, str]:
        """Return the names of all parameters, by `id`."""
        named = {**dict(self._model.named_parameters()), **self.beside()}
        return {id(tensor): name for name, tensor in reversed(named.items())}

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers that are not in the model's `state_dict`."""
        return passing_of(self._model)

    def beside(self) -> dict[str, Tensor]:
        """Return the tensors outside the model that training changes, by name.

        These are weights and buffers of the loss, other optimized tensors and, for an optimizer that evaluates with
        other weights than it trains, the weights in training.
        """
        known = {id(t) for t in (*self._model.parameters(), *self._model.buffers())}
        named: list[tuple[str, Tensor]] = []
        if isinstance(self._loss_fn, nn.Module):
            of_loss = (*self._loss_fn.named_parameters(), *self._loss_fn.named_buffers())
            named += [(f"loss_fn.{name}", t) for name, t in of_loss]
        for number, group in enumerate(self._optimizer.param_groups):
            named += [(f"optimizer.{number}.{index}", p) for index, p in enumerate(group["params"])]
        first_names = {id(t): (name, t) for name, t in reversed(named) if id(t) not in known}
        trained = weights_of(self._model) if switches_weights(self._optimizer) else {}
        return dict(first_names.values()) | {f"train.{name}": t for name, t in trained.items()}
