"""The findings of the check before training about a loss over the window."""

from collections.abc import Sequence
from dataclasses import dataclass

from .loss_memory import LossMemory


@dataclass(frozen=True)
class WindowReport:
    """The findings about a loss that reads all rows of a window together, so that it has no items to count.

    Attributes:
        read_parameters: the names of the model's parameters that the loss reads itself.
        memory: the memory that the loss takes; None if unknown.
    """

    read_parameters: Sequence[str]
    memory: LossMemory | None
