"""When to stop, and which epoch's weights to end with."""

import math
from typing import Any

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
        """
        self._patience = math.inf if patience is None else patience
        self._keeps = keep_weights
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
            if self._keeps:
                self.weights = {name: t.to("cpu", copy=True) for name, t in model.state_dict().items()}
        elif updated:
            self._epochs_since += 1
        return self.has_ended

    @property
    def has_ended(self) -> bool:
        """Whether training should have stopped by now."""
        return self._epochs_since >= self._patience

    def in_words(self) -> str:
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
        model.load_state_dict(self.weights)
        return True
