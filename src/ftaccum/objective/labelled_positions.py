"""The positions of a batch at which logits predict a label.

Shape suffixes: B rows, L tokens of a row, N labelled positions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LabelledPositions:
    """A rule for which positions of a batch have a label.

    Attributes:
        shifts: whether logits predict the next label.
        ignore_index: the label that does not count.
    """

    shifts: bool
    ignore_index: int

    def places(self, labels_BL: Tensor, n_labels: int | None = None) -> Tensor:
        """Return the N places of the logits that predict a label, in the flattened batch.

        Args:
            n_labels: their number; None to count them, which waits for the device.
        """
        counted_BL = labels_BL != self.ignore_index
        if self.shifts:
            counted_BL = F.pad(counted_BL[:, 1:], (0, 1), value=False)
        counted = counted_BL.flatten()
        if n_labels is None or counted.device.type not in ("cpu", "cuda"):  # others lack the operation
            return counted.nonzero()[:, 0]
        return torch.nonzero_static(counted, size=n_labels)[:, 0]

    def targets(self, labels_BL: Tensor, places_N: Tensor) -> Tensor:
        """Return the label that is predicted at each of these places."""
        return labels_BL.flatten()[places_N + int(self.shifts)]

    def scatter(self, values_1N: Tensor, labels_BL: Tensor) -> Tensor:
        """Scatter values of labelled positions into a tensor of shape (B, L), with 0 elsewhere.

        Args:
            values_1N: of shape (1, N).
        """
        scattered_BL = values_1N.new_zeros(labels_BL.shape)
        scattered_BL.view(-1)[self.places(labels_BL)] = values_1N[0]
        return scattered_BL
