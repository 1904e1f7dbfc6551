"""Early stopping, and the weights of the best epoch."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class BestEpoch:
    """The epoch with the best validation loss so far, which decides when to stop early."""

    def __init__(self, patience: int | None, keep_weights: bool) -> None:
        """Args:
        patience: stop after this many epochs without a better loss; None for never.
        keep_weights: whether to keep a copy of the best epoch's weights in host memory.

        Attributes:
            loss: the best validation loss so far; infinite before the first.
            weights: weights of the best epoch; None before it or if they are not kept.
            keeps_weights: whether the weights of the best epoch are kept.
        """
        self._patience = math.inf if patience is None else patience
        self.keeps_weights = keep_weights
        self.loss = math.inf
        self._epochs_since = 0
        self.weights: dict[str, Tensor] | None = None

    def ends_after(self, val_loss: float | None, model: nn.Module, *, updated: bool) -> bool:
        """Record an epoch's validation loss, and return whether training should stop. NaN never counts as better.

        Args:
            updated: whether the epoch had an update. An epoch without one does not count towards the patience.
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
        """Whether training should stop."""
        return self._epochs_since >= self._patience

    def describe(self) -> str:
        """Return a message on why training stopped."""
        if self.loss == math.inf:
            return f"Stopped early: no finite validation loss in {self._patience} epochs, so there is no best epoch."
        return f"Stopped early: no better validation loss in {self._patience} epochs."

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the weights, which a checkpoint stores separately."""
        return {"loss": self.loss, "epochs_since": self._epochs_since}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loss, self._epochs_since = state_dict["loss"], state_dict["epochs_since"]

    def restore(self, model: nn.Module) -> bool:
        """Load the best epoch's weights into the model, and return whether they had been kept."""
        if self.weights is None:
            return False
        fill(weights_of(model), self.weights)
        return True


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights and persistent buffers of a model by name, with tied weights only once.

    For a PEFT model, frozen base weights are left out, because they come with the model.
    """
    adapted = hasattr(model, "peft_config")
    weights: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad or not adapted}
    passing = passing_of(model)
    return weights | {name: b for name, b in model.named_buffers() if name not in passing}


def passing_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are not in a model's `state_dict`."""
    names = {
        f"{prefix}.{name}".lstrip(".") for prefix, m in model.named_modules() for name in m._non_persistent_buffers_set
    }
    return {name: b for name, b in model.named_buffers() if name in names}


def fill(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Copy saved values into tensors of the same names. Unless `strict`, skip tensors whose saved shape differs."""
    for name, tensor in own.items():
        if not strict and (name not in saved or saved[name].shape != tensor.shape):
            continue
        # An expanded tensor cannot be written to. It need not be if its values are equal already.
        if tensor.is_contiguous() or not torch.equal(tensor.cpu(), saved[name]):
            tensor.detach().copy_(saved[name])
