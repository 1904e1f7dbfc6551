"""The memory that a loss over the window takes for a given number of rows, predicted from a few small ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.state_guards import preserve_rng
from .forward import total_of
from .window_loss import WindowLoss
from .window_terms import Values

_ROWS = 16  # the loss is tried with this number of rows, twice and four times as many
_OF_BACKWARD = 2.0  # the memory that the loss keeps for its backward pass, and what this pass takes besides


@dataclass(frozen=True)
class LossMemory:
    """Bytes as a polynomial in the number of rows: constant + linear · n + square · n²."""

    constant: float
    linear: float
    square: float

    def of(self, n_rows: int) -> float:
        """Return the bytes that the loss of a number of rows takes, with its backward pass."""
        return self.constant + self.linear * n_rows + self.square * n_rows**2

    @classmethod
    def measure(cls, window_loss: WindowLoss, values: Values) -> "LossMemory | None":
        """Count the bytes that the loss keeps for its backward pass, with a few numbers of rows.

        Args:
            values: what the loss reads of a few rows, which are repeated.

        Returns:
            None if the loss cannot be computed for repeated rows.
        """
        try:
            with preserve_rng(), torch.enable_grad():
                few, twice, four_times = (_bytes_kept(window_loss, values, n) for n in (_ROWS, 2 * _ROWS, 4 * _ROWS))
        except Exception:  # the loss may not accept repeated rows
            return None
        square = max(0.0, (four_times - 3 * twice + 2 * few) / (6 * _ROWS**2))
        linear = max(0.0, (twice - few) / _ROWS - 3 * _ROWS * square)
        constant = max(0.0, few - linear * _ROWS - square * _ROWS**2)
        return cls(*(_OF_BACKWARD * part for part in (constant, linear, square)))


def _bytes_kept(window_loss: WindowLoss, values: Values, n_rows: int) -> int:
    """Return the bytes that the loss of some rows keeps for its backward pass."""
    repeated = {name: value[torch.arange(n_rows, device=value.device) % len(value)] for name, value in values.items()}
    inputs = {name: v for name, v in WindowLoss.inputs(repeated).items() if v.is_floating_point()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = total_of(window_loss.loss({**repeated, **{n: v.detach().requires_grad_() for n, v in inputs.items()}}))
    del loss  # it holds the tensors until now, so that no two have the same address
    return sum(kept.values())
