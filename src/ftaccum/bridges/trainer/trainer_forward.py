"""The forward pass of a Trainer, which computes its loss in `compute_loss`."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ...objective.forward import Forward
from ...objective.item_counts import Batch
from ...objective.own_loss import LOSS

ComputeLoss = Callable[..., Tensor]  # takes the model, a batch and, by name, `num_items_in_batch`


class TrainerForward(Forward):
    """A forward pass whose loss is the mean that a Trainer computes for one batch."""

    def __init__(self, compute_loss: ComputeLoss, inner: nn.Module) -> None:
        """Args:
        compute_loss: returns the mean loss of a batch. It may change the batch.
        inner: the model inside all wrappers, whose outputs may name parts of the loss.
        """
        super().__init__([], None)
        self._compute_loss, self._inner = compute_loss, inner
        self._is_settled = False

    def stop_reading_outputs(self) -> None:
        """Read the model's outputs from now on only if the terms of the loss come from them."""
        self._is_settled = True

    def _outputs(self, model: nn.Module, batch: Batch) -> Any:
        if self._is_settled and not self.factors and not self.has_spans:  # a hook would make torch.compile start again
            return {LOSS: self._compute_loss(model, dict(batch))}
        seen: list[Any] = []
        hook = self._inner.register_forward_hook(lambda _, __, outputs: seen.append(outputs))
        try:
            # Not `return_outputs=True`, for which trainers of TRL run the model a second time.
            loss = self._compute_loss(model, dict(batch))
        finally:
            hook.remove()
        outputs = seen[-1] if seen and isinstance(seen[-1], Mapping) else {}
        return {**outputs, LOSS: loss}
