"""Values of one forward pass that are computed when they are read, at the positions at which they are read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .selection import EVERYTHING, NOTHING, Selection

Compute = Callable[[Selection], Tensor]


class LazyError(RuntimeError):
    """An operation whose result would depend on when values are computed."""


@dataclass(frozen=True)
class Frame:
    """What the values of one forward pass share.

    Attributes:
        n_rows, length: the number of rows, and of positions in each.
        products: the values that are products with a weight, and how many numbers the weight has.
    """

    n_rows: int
    length: int
    device: torch.device
    grad: bool = field(default_factory=torch.is_grad_enabled)
    autocast: torch.dtype | None = None
    products: list[tuple["Value", int]] = field(default_factory=list)

    @classmethod
    def of(cls, hidden_BLH: Tensor) -> "Frame":
        """Return the frame of a pass with these hidden states."""
        n_rows, length = hidden_BLH.shape[:2]
        return cls(n_rows, length, hidden_BLH.device, autocast=_autocast(hidden_BLH.device))

    def is_current(self) -> bool:
        """Return whether autograd and autocast are set as at the start of the pass."""
        return torch.is_grad_enabled() == self.grad and _autocast(self.device) == self.autocast

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Set autograd and autocast as at the start of the pass."""
        if self.is_current():
            yield
            return
        kind, dtype = self.device.type, self.autocast or torch.get_autocast_dtype(self.device.type)
        with torch.set_grad_enabled(self.grad), torch.autocast(kind, dtype, enabled=self.autocast is not None):
            yield

    def saved_weights(self) -> int:
        """Return how many numbers of weights were not multiplied with all positions."""
        return sum(size for product, size in self.products if product.is_partial)


class Value:
    """A value with rows in dimension 0 and positions in another.

    Attributes:
        dim: the dimension of positions, negative.
        shape: its shape with all positions.
        like: the value at no position, which has its type.
    """

    def __init__(
        self, frame: Frame, compute: Compute, dim: int, operands: Sequence[Tensor] = (), *, draws: bool = False
    ) -> None:
        """Args:
        compute: computes the value at selected positions.
        operands: tensors that it reads, which must not change until then.
        draws: whether it draws random numbers.
        """
        self.frame, self.dim = frame, dim
        self._compute, self._draws = compute, draws
        self._versions = [(operand, operand._version) for operand in operands if not operand.is_inference()]
        self._whole: Tensor | None = None
        self._read: dict[Selection, Tensor] = {}
        self.like = compute(NOTHING)
        shape = list(self.like.shape)
        if shape[0] != frame.n_rows or shape[dim] != 0:
            raise ValueError("the result has no dimensions of rows and positions where they are expected")
        shape[dim] = frame.length
        self.shape = torch.Size(shape)

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def is_partial(self) -> bool:
        """Whether it was read, but not everywhere."""
        return self._whole is None and bool(self._read)

    def whole(self) -> Tensor:
        """Return the value at all positions."""
        return self.at(EVERYTHING)

    def at(self, selection: Selection) -> Tensor:
        """Return the value at selected positions.

        Raises:
            LazyError: if an operand has changed, or random numbers would be drawn twice for one position.
        """
        if selection is NOTHING:
            return self.like
        if self._whole is not None:
            return selection.of(self._whole, self.dim)
        if selection in self._read:
            return self._read[selection]
        if self._draws and self._read:
            raise LazyError("random numbers for some positions are needed again for others")
        if any(operand._version != version for operand, version in self._versions):
            raise LazyError("a tensor was changed in place before it was used")
        with self.frame.settings():
            value = self._compute(selection)
        if selection is EVERYTHING:
            self._whole = value
        else:
            self._read[selection] = value
        return value


def _autocast(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
