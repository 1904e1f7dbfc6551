"""Positions of sequences at which a value is read.

Dimension 0 of a value has its rows. Another dimension, given as a negative number, has its positions.

Shape suffixes: B rows, L positions, N pairs of a row and a position.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Selection(ABC):
    """The positions at which a value is read."""

    @abstractmethod
    def of(self, value: Tensor, dim: int) -> Tensor:
        """Return a value with B rows and L positions in dimension `dim`, at the selected ones."""

    def rows_of(self, value: Tensor) -> Tensor:
        """Return the selected rows of a value, with all positions."""
        return value

    def causal(self, n_keys: int, device: torch.device) -> Tensor | None:
        """Return which keys precede the selected positions or are there, as a mask that attention takes."""
        return torch.ones(1, n_keys, dtype=torch.bool, device=device)


class _Everything(Selection):
    def of(self, value: Tensor, dim: int) -> Tensor:  # noqa: ARG002
        return value

    def causal(self, n_keys: int, device: torch.device) -> Tensor | None:  # noqa: ARG002
        return None


class _Nothing(Selection):
    """No position: operations cost nothing, and their results show the type and the shape."""

    def of(self, value: Tensor, dim: int) -> Tensor:
        return value.narrow(dim, 0, 0)


EVERYTHING, NOTHING = _Everything(), _Nothing()


@dataclass(frozen=True)
class Position(Selection):
    """One position in all rows. Values keep the dimension of positions, with size 1."""

    position: int  # from 0

    def of(self, value: Tensor, dim: int) -> Tensor:
        return value.narrow(dim, self.position, 1)

    def causal(self, n_keys: int, device: torch.device) -> Tensor | None:
        return (torch.arange(n_keys, device=device) <= self.position)[None]


@dataclass(frozen=True, eq=False)
class Pairs(Selection):
    """Different pairs of a row and a position, from 0, each of shape (N,). Values have N rows and one position each."""

    rows: Tensor
    positions: Tensor

    def of(self, value: Tensor, dim: int) -> Tensor:
        rows = self.rows if len(value) > 1 else torch.zeros_like(self.rows)  # the same for all rows
        return value.movedim(dim, 1)[rows, self.positions].unsqueeze(1).movedim(1, dim)

    def rows_of(self, value: Tensor) -> Tensor:
        return value.index_select(0, self.rows)

    def causal(self, n_keys: int, device: torch.device) -> Tensor | None:
        return (torch.arange(n_keys, device=device) <= self.positions[:, None])[:, None, None]
