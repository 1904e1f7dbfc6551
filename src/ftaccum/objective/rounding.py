"""What rounding may make of a gradient, by precision."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

# How many times the measured rounding still counts as rounding: of all heads and precisions that were tried, no split
# came to more than 1.6 times.
_TIMES = 4.0


@dataclass(frozen=True)
class Rounding:
    """The relative errors that count as rounding.

    Attributes:
        least: what always counts. Below it nothing is told apart.
        most: what never counts is above it, whatever was measured.
    """

    least: float
    most: float

    @classmethod
    def of(cls, dtypes: Iterable[torch.dtype], autocast: str = "no") -> "Rounding":
        """Return the bounds for weights of these types.

        Args:
            autocast: "no", or the 16-bit type that operations on float32 weights are run in.
        """
        eps = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point or dtype.is_complex)
        if eps <= torch.finfo(torch.float64).eps:  # which autocast leaves alone
            return cls(1e-10, 1e-5)
        return cls(1e-6, 1e-3) if eps <= torch.finfo(torch.float32).eps and autocast == "no" else cls(1e-3, 0.1)

    def tolerance(self, floor: float) -> float:
        """Return the largest error that counts as rounding.

        Args:
            floor: the error that rounding alone was measured to make.
        """
        return min(max(self.least, _TIMES * floor), self.most)
