"""The weights of the best evaluation, and the tensors of a model that checkpoints save."""

from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.model_wrapper import model_to_save
from ..runtime.sharding.layout import reshard
from ..runtime.sharding.tensors import local_part

OF_LOSS = "loss_fn/"  # begins the names of a loss's weights; no name of a model's weight has a slash


class BestWeights:
    """A copy of the weights of the best evaluation, in host memory. Of sharded weights, a process keeps its own part.

    If the loss has weights or buffers of its own, they are among them: an evaluation depends on both.

    Attributes:
        is_kept: whether the run keeps a copy. If not, `keep` does nothing.
        weights: the weights; None before the first evaluation.
        n_updates: number of updates that the weights have had.
        after: evaluations up to this number of updates are ignored, because their weights are lost.
    """

    def __init__(self, is_kept: bool, loss_fn: Any = None) -> None:
        self.is_kept, self._loss_fn = is_kept, loss_fn
        self.weights: dict[str, Tensor] | None = None
        self.n_updates = self.after = 0

    def keep(self, model: nn.Module, n_updates: int) -> None:
        """Copy the current weights of a model."""
        if self.is_kept:
            named = {name: local_part(t.detach()) for name, t in self.tensors_of(model).items()}
            self.weights = {name: t.to("cpu", copy=True).contiguous() for name, t in named.items()}
            self.n_updates = n_updates

    def restore(self, model: nn.Module) -> bool:
        """Load the weights into the model and the loss, and return whether there were any."""
        if self.weights is None:
            return False
        for name, tensor in self.tensors_of(model).items():
            if name in self.weights:  # older checkpoints have none of the loss
                assign(tensor, self.weights[name])
        return True

    def tensors_of(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors to keep a copy of: the weights of the model, and those that only the loss has."""
        weights = weights_of(model)
        if isinstance(self._loss_fn, nn.Module):
            known = {id(t) for t in (*model.parameters(), *model.buffers())}
            of_loss = (*self._loss_fn.named_parameters(), *self._loss_fn.named_buffers())
            weights |= {f"{OF_LOSS}{name}": t for name, t in of_loss if id(t) not in known}
        return weights

    def state_dict(self) -> dict[str, int]:
        """Return the state without the weights, which a checkpoint stores separately."""
        return {"n_updates": self.n_updates, "after": self.after}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.n_updates, self.after = state_dict["n_updates"], state_dict["after"]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights and persistent buffers of a model by name, with tied weights only once.

    For a PEFT model, frozen base weights are left out, because they come with the model. If the model is sharded, its
    gathered weights are freed first.
    """
    reshard(model)
    left_out = base_weights(model)
    weights: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p not in left_out}
    passing = passing_of(model)
    return weights | {name: b for name, b in model.named_buffers() if name not in passing}


def base_weights(model: nn.Module) -> set[nn.Parameter]:
    """Return the frozen weights of a PEFT model, also of one in a `ModelWrapper`. The set is empty for other models.

    Other frozen weights of a `ModelWrapper` are not among them, as its `forward` may change these.
    """
    inner = model_to_save(model)
    return {p for p in inner.parameters() if not p.requires_grad} if hasattr(inner, "peft_config") else set()


def passing_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are not in a model's `state_dict`."""
    names = {
        f"{prefix}.{name}".lstrip(".") for prefix, m in model.named_modules() for name in m._non_persistent_buffers_set
    }
    return {name: b for name, b in model.named_buffers() if name in names}


def assign(tensor: Tensor, values: Tensor) -> None:
    """Copy values into a tensor; of a sharded one, those of this process's part."""
    part = local_part(tensor.detach())
    # An expanded tensor cannot be written to. It need not be if its values are equal already.
    if part.is_contiguous() or not torch.equal(part.cpu(), values):
        part.copy_(values)
