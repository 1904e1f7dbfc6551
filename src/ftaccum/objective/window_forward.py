"""The forward pass of a model whose loss reads all rows of a window."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .forward import total_of
from .item_counts import Batch
from .model_forward import LossFn, ModelForward
from .window_loss import WindowLoss
from .window_terms import Values


class WindowForward(ModelForward):
    """A forward pass with `loss_over="window"`. As a forward pass of one batch, it gives the loss of its rows alone."""

    def __init__(self, model: nn.Module, batch: Batch, window_loss: WindowLoss) -> None:
        super().__init__(model, batch, window_loss)
        self.window_loss = window_loss
        self._flags = {}  # `loss_fn` computes the loss, so the model need not

    @property
    def state(self) -> Mapping[str, Any]:
        return self.window_loss.state

    def _settle(
        self,
        model: nn.Module,  # noqa: ARG002
        batch: Batch,  # noqa: ARG002
        loss_fn: LossFn | None,
        token_ids: bool,  # noqa: ARG002
    ) -> Callable[[Any, Batch], Any] | None:
        return loss_fn

    def values(self, model: nn.Module, batch: Batch) -> Values:
        """Run the model on a batch, and return what the loss reads of it."""
        return self.window_loss.read(self.outputs(model, batch), batch)

    def unweighted_loss(self, model: nn.Module, batch: Batch, places: Sequence[int] = ()) -> Tensor:
        return total_of(self.window_loss(self._outputs(model, batch), batch, places))
