"""When to stop, and which epoch's weights to end with."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class BestEpoch:
    """Follows the validation loss from epoch to epoch."""

    def __init__(self, patience: int | None, keep_weights: bool) -> None:
        """Args:
        patience: epochs without a better loss after which to stop; None for never.
        keep_weights: whether to keep a copy of the best epoch's weights, in host memory.

        Attributes:
            loss: the best so far, infinite before the first.
            weights: of that epoch, where they are kept.
            keeps_weights: whether they are, once there was one.
        """
        self._patience = math.inf if patience is None else patience
        self.keeps_weights = keep_weights
        self.loss = math.inf
        self._epochs_since = 0
        self.weights: dict[str, Tensor] | None = None

    def ends_after(self, val_loss: float | None, model: nn.Module, *, updated: bool) -> bool:
        """Takes an epoch's validation loss, and says whether training should stop. A NaN is never better.

        Args:
            updated: whether the epoch had an update. One without says nothing for training to stop by.
        """
        if val_loss is None:
            return False
        if val_loss < self.loss:
            self.loss, self._epochs_since = val_loss, 0
            if self.keeps_weights:
                self.weights = {
                    name: t.detach().to("cpu", copy=True).contiguous() for name, t in weights_of(model).items()
                }
        elif updated:
            self._epochs_since += 1
        return self.has_ended

    @property
    def has_ended(self) -> bool:
        """Whether training should have stopped by now."""
        return self._epochs_since >= self._patience

    def describe(self) -> str:
        """Why it did."""
        if self.loss == math.inf:
            return f"Stopped early: no finite validation loss in {self._patience} epochs, so none is the best."
        return f"Stopped early: no better validation loss in {self._patience} epochs."

    def state_dict(self) -> dict[str, Any]:
        """Without the weights, which are large."""
        return {"loss": self.loss, "epochs_since": self._epochs_since}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loss, self._epochs_since = state_dict["loss"], state_dict["epochs_since"]

    def restore(self, model: nn.Module) -> bool:
        """Puts the best epoch's weights back, where they were kept, and says whether they were."""
        if self.weights is None:
            return False
        fill(weights_of(model), self.weights)
        return True


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """What makes a model what it has learnt: weights, and buffers of its `state_dict`. A weight that is tied is there
    once. Of an adapted model (PEFT), the base weights that are not trained are left out: they come with the model."""
    adapted = hasattr(model, "peft_config")
    weights: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad or not adapted}
    passing = passing_of(model)
    return weights | {name: b for name, b in model.named_buffers() if name not in passing}


def passing_of(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are none of its `state_dict`."""
    names = {
        f"{prefix}.{name}".lstrip(".") for prefix, m in model.named_modules() for name in m._non_persistent_buffers_set
    }
    return {name: b for name, b in model.named_buffers() if name in names}


def fill(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Has tensors hold what was saved by their names; where not `strict`, of those that have a shape as saved."""
    for name, tensor in own.items():
        if not strict and (name not in saved or saved[name].shape != tensor.shape):
            continue
        # One number may stand for many (expanded), which cannot be written to, and need not be.
        if tensor.is_contiguous() or not torch.equal(tensor.cpu(), saved[name]):
            tensor.detach().copy_(saved[name])
