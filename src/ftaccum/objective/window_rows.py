"""The values of a window's micro-batches, checked and joined before they are gathered over processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DataError
from .window_loss import WindowLoss
from .window_terms import CollectedValues

RowSpec = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # the shape of a row and the type, by name


@dataclass(frozen=True)
class MicroBatches:
    """The rows of this process's micro-batches: their places in the window, and the shape and type of each value.

    Processes exchange these before they gather the values.

    Attributes:
        places: the positions of their rows in the window.
        rows: for each micro-batch, the shape of a row and the type of each value.
    """

    places: Sequence[int]
    rows: Sequence[RowSpec]

    @classmethod
    def of(cls, passes: Sequence[CollectedValues]) -> "MicroBatches":
        return cls(
            [place for each in passes for place in each.places],
            [{name: (tuple(v.shape[1:]), v.dtype) for name, v in each.values.items()} for each in passes],
        )

    @property
    def specs(self) -> RowSpec:
        """The shapes and types of all rows together; empty without rows."""
        first = self.rows[0] if self.rows else {}
        return {name: ((len(self.places), *shape), dtype) for name, (shape, dtype) in first.items()}


def check_equal(rows: Sequence[RowSpec]) -> None:
    """Check that the micro-batches of a window have values of the same names, shapes and types.

    Raises:
        DataError: on all processes, if they are given the same rows.
    """
    for other in rows[1:]:
        if other.keys() != rows[0].keys():
            one, two = (sorted(map(WindowLoss.describe, each)) for each in (rows[0], other))
            raise DataError(
                f"With `loss_over='window'`, the loss must read the same values of all rows, but it reads {one} of one "
                f"micro-batch and {two} of another. Let `loss_inputs` return the same names for every batch."
            )
        for name, (shape, dtype) in other.items():
            if (shape, dtype) != rows[0][name]:
                shapes = sorted({str(each[name][0]) for each in (rows[0], other)})
                differ = (
                    f"the shapes {' and '.join(shapes)}"
                    if len(shapes) > 1
                    else f"the types {rows[0][name][1]} and {dtype}"
                )
                raise DataError(
                    f"With `loss_over='window'`, {WindowLoss.describe(name)} must have the same shape and type for all "
                    f"rows, but rows of one update have {differ}. Pad it to a fixed length, or leave it out."
                )


def joined(passes: Sequence[CollectedValues]) -> dict[str, Tensor]:
    """Return the values of micro-batches, one after the other."""
    names = passes[0].values if passes else ()
    return {name: torch.cat([each.values[name] for each in passes]) for name in names}
