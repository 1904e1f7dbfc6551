"""The weights of the best evaluation, and the tensors of a model that checkpoints save."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class BestWeights:
    """A copy of the weights of the best evaluation, in host memory.

    Attributes:
        is_kept: whether the run keeps a copy. If not, `keep` does nothing.
        weights: the weights; None before the first evaluation.
        n_updates: number of updates that the weights have had.
        after: evaluations up to this number of updates are ignored, because their weights are lost.
    """

    def __init__(self, is_kept: bool) -> None:
        self.is_kept = is_kept
        self.weights: dict[str, Tensor] | None = None
        self.n_updates = self.after = 0

    def keep(self, model: nn.Module, n_updates: int) -> None:
        """Copy the current weights of a model."""
        if self.is_kept:
            named = weights_of(model).items()
            self.weights = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in named}
            self.n_updates = n_updates

    def restore(self, model: nn.Module) -> bool:
        """Load the weights into the model, and return whether there were any."""
        if self.weights is None:
            return False
        fill(weights_of(model), self.weights)
        return True

    def state_dict(self) -> dict[str, int]:
        """Return the state without the weights, which a checkpoint stores separately."""
        return {"n_updates": self.n_updates, "after": self.after}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.n_updates, self.after = state_dict["n_updates"], state_dict["after"]


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
