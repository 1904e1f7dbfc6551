"""Values of one forward pass that are computed when they are read, at the positions at which they are read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .selection import EVERYTHING, NOTHING, Selection

Compute = Callable[[Selection], Tensor]


class LazyError(RuntimeError):
    """An operation whose result would depend on when values are computed."""


@dataclass
class Frame:
    """The context of one forward pass, which its values share: its rows, its device and its autograd settings.

    Attributes:
        n_rows, length: the number of rows, and of positions in each.
        saved_weights: the numbers of weights that were multiplied with some positions only.
        is_open: whether the pass is running.
    """

    n_rows: int
    length: int
    device: torch.device
    grad: bool
    autocast: torch.dtype | None
    saved_weights: int = 0
    is_open: bool = True

    @classmethod
    def of(cls, hidden_BLH: Tensor) -> "Frame":
        """Return the frame of a pass with these hidden states."""
        (n_rows, length), device = hidden_BLH.shape[:2], hidden_BLH.device
        return cls(n_rows, length, device, torch.is_grad_enabled(), _autocast(device))

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


class Value:
    """A value with rows in dimension 0 and positions in another.

    Attributes:
        dim: the dimension of positions, negative.
        shape: its shape with all positions.
        like: the value at no position, which has its type.
        n_weights: the numbers of the weight that it is a product with; 0 for other values.
    """

    def __init__(
        self, frame: Frame, compute: Compute, dim: int, operands: Sequence[Tensor] = (), *, draws: bool = False
    ) -> None:
        """Args:
        compute: computes the value at selected positions.
        operands: tensors that it reads, which must not change until then.
        draws: whether it draws random numbers.
        """
        self.frame, self.dim, self.n_weights = frame, dim, 0
        self._compute, self._draws = compute, draws
        self._operands = [_GuardedTensor(operand) for operand in operands]
        self._whole: _GuardedTensor | None = None
        self._read: dict[Selection, _GuardedTensor] = {}
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
            LazyError: if a tensor that it depends on has changed, or random numbers would be drawn twice for one
                position.
        """
        if selection is NOTHING:
            return self.like
        if self._whole is not None:
            whole = self._whole.unchanged() if self.frame.is_open else self._whole.tensor
            return selection.of(whole, self.dim)
        if selection in self._read:
            return self._read[selection].unchanged()
        if self._draws and self._read:
            raise LazyError("random numbers for some positions are needed again for others")
        for operand in self._operands:
            operand.unchanged()
        was_partial = self.is_partial
        with self.frame.settings():
            value = _GuardedTensor(self._compute(selection))
        if selection is EVERYTHING:
            self._whole = value
        else:
            self._read[selection] = value
        self.frame.saved_weights += self.n_weights * (self.is_partial - was_partial)
        return value.tensor


class _GuardedTensor:
    """A tensor that must not change in place."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._version = tensor, _version(tensor)

    def unchanged(self) -> Tensor:
        if _version(self.tensor) != self._version:
            raise LazyError("a tensor was changed in place before it was used")
        return self.tensor


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _autocast(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
