"""The cross entropy of a model's logits with its labels, with class weights and label smoothing."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError
from .item_counts import IGNORE_INDEX, Batch, targets_of
from .normalizer import widened
from .own_loss import logits_of

_SHOWN = 6  # weights, in a message


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    """The mean cross entropy of logits and integer labels, as `torch.nn.CrossEntropyLoss` defines it.

    For labels y with logits z, over the labels that are not ignored, with the class weights w and the smoothing ε:

        ( Σᵢ (1 - ε) · w[yᵢ] · -log softmax(zᵢ)[yᵢ]  +  ε / C · Σᵢ Σ_c w[c] · -log softmax(zᵢ)[c] )  /  Σᵢ w[yᵢ]

    So it is a mean over the weights of the labels, which `weight` and `ignore_index` declare.

    Attributes:
        ignore_index: the label that does not count.
        shifted: whether logits predict the next label of a row.
        label_smoothing: ε, from 0 to below 1.
        weight: the weights in float64, of shape (classes,); None for equal ones.
    """

    ignore_index: int = IGNORE_INDEX
    shifted: bool = False
    label_smoothing: float = 0.0
    weight: Tensor | None = None
    _converted: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss, as a scalar in float32 or wider.

        Raises:
            DataError: if the logits do not have the shape of the labels and a dimension for the classes.
        """
        logits, labels = logits_of(outputs), targets_of(batch)
        if labels is None or logits.shape[:-1] != labels.shape:
            of_labels = "no labels" if labels is None else f"labels of shape {tuple(labels.shape)}"
            raise DataError(
                "The cross entropy needs logits of the shape of the labels and a last dimension of classes, but "
                f"the model returns logits of shape {tuple(logits.shape)} for {of_labels}. Give a `loss_fn`."
            )
        if self.shifted:
            labels = F.pad(labels[:, 1:], (0, 1), value=self.ignore_index)  # cutting logits would copy them
        logits_NC = widened(logits.reshape(-1, logits.shape[-1]))
        return F.cross_entropy(
            logits_NC,
            labels.reshape(-1),
            self._weight_like(logits_NC),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def describe(self) -> list[str]:
        """Return the banner's lines about weights and smoothing."""
        lines = []
        if self.weight is not None:
            listed = ", ".join(f"{weight:.4g}" for weight in self.weight[:_SHOWN].tolist())
            lines.append(f"Class weights: {listed}{', …' if len(self.weight) > _SHOWN else ''}")
        return lines + ([f"Label smoothing: {self.label_smoothing:g}"] if self.label_smoothing else [])

    def _weight_like(self, logits: Tensor) -> Tensor | None:
        """Return the weights on the device and in the type of the logits. They are copied there only once."""
        if self.weight is None:
            return None
        key = (logits.device, logits.dtype)
        if key not in self._converted:
            self._converted[key] = self.weight.to(logits.device, logits.dtype)
        return self._converted[key]
