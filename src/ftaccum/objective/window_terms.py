"""Terms of a loss that read all rows of a window together, computed in two passes over its micro-batches.

No weighting of micro-batches makes such a term exact. So a first pass, without gradients, collects what the terms read.
Then the terms of the whole window are computed once, with their gradient by each micro-batch's values. A second pass
runs each micro-batch again and backpropagates that gradient.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..runtime.process_group import ProcessGroup
from .item_counts import Batch
from .normalizer import Means

Values = Mapping[str, Tensor]  # what the terms read of a micro-batch, by name


@dataclass(frozen=True)
class CollectedValues:
    """The values that the first pass collected from a micro-batch.

    Attributes:
        places: the positions of its rows in the window.
        values: the values that the terms read, without a graph.
    """

    places: Sequence[int]
    values: Values

    @classmethod
    def of(cls, places: Sequence[int], values: Values) -> "CollectedValues":
        """Return the collected values, without keeping more in memory than these.

        A loss may read a view of a much larger output, such as the first token of the hidden states.
        """
        return cls(places, {name: _without_rest(value.detach()) for name, value in values.items()})


def _without_rest(value: Tensor) -> Tensor:
    """Return a tensor that keeps no more memory than its own numbers."""
    return value.clone() if value.untyped_storage().nbytes() > value.numel() * value.element_size() else value


@dataclass(frozen=True)
class WindowPart:
    """The contribution of a micro-batch to the terms of a window.

    Attributes:
        loss: its part of the terms (a scalar). The parts of all micro-batches, on all processes, add up to the terms.
        surrogate: a scalar whose gradient is this micro-batch's part of the terms' gradient. Its value means nothing.
    """

    loss: Tensor
    surrogate: Tensor


class ComputedTerms(ABC):
    """The terms of one window, after its first pass.

    Attributes:
        means: the terms of the whole window, by name.
    """

    means: Means

    @abstractmethod
    def part(self, index: int, values: Values) -> WindowPart:
        """Return what a micro-batch of this process adds to the terms.

        Args:
            index: the position of the micro-batch among those that the first pass ran on this process.
            values: what the terms read of it in the second pass, with its graph.
        """

    @abstractmethod
    def zero(self, values: Values) -> Tensor:
        """Return 0, a scalar with a gradient of zeros by what the surrogate of a micro-batch depends on.

        Args:
            values: what the terms read of a dummy micro-batch.
        """

    def of_parameters(self) -> Tensor | None:
        """Return a scalar whose gradient is that of the terms by the parameters that they read themselves.

        All processes compute the same one. It is None if the terms read no trainable parameter.
        """
        return None


class WindowTerms(ABC):
    """The terms of a loss that read all rows of a window together.

    Attributes:
        names: the names of the terms.
    """

    names: Sequence[str]

    def compared(self, values: Values) -> Values:
        """Return what must be the same in both passes of a micro-batch, among what the terms read of it."""
        return {name: value for name, value in values.items() if value.is_floating_point()}

    @abstractmethod
    def read(self, outputs: Any, batch: Batch) -> Values:
        """Return what the terms read of a micro-batch.

        Args:
            outputs: the outputs of the model.
            batch: the micro-batch, on the device of the model.
        """

    @abstractmethod
    def compute(
        self, passes: Sequence[CollectedValues], process_group: ProcessGroup, seed: Sequence[int]
    ) -> ComputedTerms:
        """Compute the terms of a window, with their gradients if gradients are on. All processes call this together.

        Args:
            passes: what the first pass collected on this process; empty if it has no rows of the window.
            seed: seeds the random numbers that the terms draw; the same on all processes.
        """
