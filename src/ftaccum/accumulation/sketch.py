"""Sketches of gradients: what it takes to compare two of them without holding both in memory."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

WIDTH = 1024  # numbers a parameter's sketch has
_SIGNS = 1 << 20
_SEED = 0


@dataclass(frozen=True)
class GradientDifference:
    """How far one gradient is from another, the reference.

    Attributes:
        relative: ‖gradient − reference‖ / ‖reference‖; ‖gradient‖ where the reference is zero.
        scale: ‖gradient‖ / ‖reference‖.
        by_parameter: the share of each parameter in ‖gradient − reference‖², largest first.
    """

    relative: float
    scale: float
    by_parameter: Mapping[str, float]


class GradientSketch:
    """A gradient folded to at most 1,024 numbers a parameter.

    The numbers of a parameter's gradient get random signs, and those at equal positions modulo 1,024 are added up
    (Charikar, Chen and Farach-Colton, 2002). Sketching is linear: the difference of two sketches is the sketch of the
    difference, and the expected square of its norm is that of the difference itself. The estimated norm has a relative
    standard error of at most 1 / sqrt(2 · 1,024) = 2.2%; parameters of up to 1,024 numbers are exact.
    """

    def __init__(self, gradients: Iterable[tuple[str, Tensor | None]], factor: float = 1.0) -> None:
        """Sketch a gradient.

        Args:
            gradients: names and gradients of parameters; None for a parameter that takes no part.
            factor: what to divide them by.
        """
        self._folded: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        signs: dict[torch.device, Tensor] = {}
        for name, gradient in gradients:
            if gradient is None:
                continue
            device = gradient.device
            if device not in signs:
                signs[device] = _random_signs(device)
            folded, square = _fold(gradient.detach(), signs[device])
            self._folded[name], self._squares[name] = folded.cpu() / factor, square.cpu() / factor**2

    @property
    def norm(self) -> float:
        """The norm of the gradient, exactly."""
        return sum(square.item() for square in self._squares.values()) ** 0.5

    def difference(self, reference: "GradientSketch") -> GradientDifference:
        """Compare with the sketch of a reference."""
        squares = {}
        for name in dict.fromkeys([*self._folded, *reference._folded]):
            one, other = self._folded.get(name), reference._folded.get(name)
            off = other if one is None else one if other is None else one - other
            assert off is not None, "the name comes from one of the two"
            squares[name] = off.square().sum().item()
        total = sum(squares.values())
        by_size = sorted(squares, key=lambda name: -squares[name])
        return GradientDifference(
            total**0.5 / (reference.norm or 1.0),
            self.norm / (reference.norm or 1.0),
            {name: squares[name] / total for name in by_size if squares[name]},
        )


def _fold(gradient: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sketch of one parameter's gradient, and the square of its norm."""
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    flat = (torch.view_as_real(dense) if dense.is_complex() else dense).reshape(-1)
    folded = torch.zeros(WIDTH, dtype=signs.dtype, device=flat.device)
    square = torch.zeros((), dtype=signs.dtype, device=flat.device)
    for turn, chunk in enumerate(flat.split(_SIGNS)):
        wide = chunk.to(signs.dtype)
        square += wide.square().sum()
        signed = torch.nn.functional.pad(wide * signs[: len(wide)], (0, -len(wide) % WIDTH))
        # Turned, so that numbers with one sign in all chunks do not meet.
        folded += signed.view(-1, WIDTH).sum(0).roll(turn)
    return folded, square


def _random_signs(device: torch.device) -> Tensor:
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has nothing wider
    drawn = torch.randint(0, 2, (_SIGNS,), generator=torch.Generator().manual_seed(_SEED), dtype=torch.int8)
    return (2 * drawn - 1).to(device=device, dtype=dtype)
