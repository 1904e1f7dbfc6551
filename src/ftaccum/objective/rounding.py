"""Bounds on the rounding error of a gradient, by precision."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

# Errors up to this multiple of the measured rounding count as rounding. Of all heads and precisions that were tried, no
# split had an error of more than 1.6 times the measured rounding.
_TIMES = 4.0


@dataclass(frozen=True)
class Rounding:
    """The relative errors that count as rounding.

    Attributes:
        least: errors up to this one always count.
        most: errors above this one never count, whatever rounding was measured.
    """

    least: float
    most: float

    @classmethod
    def of(cls, dtypes: Iterable[torch.dtype], autocast: str = "no") -> "Rounding":
        """Return the bounds for weights of these types.

        Args:
            dtypes: the types of all weights, also those that are not trained. Integers are quantized weights, which
                compute in 16 bits.
            autocast: "no", or the 16-bit type in which autocast runs operations on float32 weights.
        """
        real = (dtype if dtype.is_floating_point or dtype.is_complex else torch.float16 for dtype in dtypes)
        eps = max(torch.finfo(dtype).eps for dtype in real)
        if eps <= torch.finfo(torch.float64).eps:  # autocast does not change float64
            return cls(1e-10, 1e-5)
        return cls(1e-6, 1e-3) if eps <= torch.finfo(torch.float32).eps and autocast == "no" else cls(1e-3, 0.1)

    def tolerance(self, floor: float) -> float:
        """Return the largest error that counts as rounding.

        Args:
            floor: the measured error of rounding alone.
        """
        return min(max(self.least, _TIMES * floor), self.most)
