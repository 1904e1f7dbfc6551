"""A language model's head that computes logits only at positions with a label.

A masked language model labels 15% of its positions, a conversation only its answers. The loss reads no other logits, so
their projection onto the vocabulary, its softmax and their gradients are left out.

Shape suffixes: B rows, L tokens of a row, N labelled positions, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError
from ..runtime.model_context import is_compiled
from ..runtime.module_attributes import has_forward_hooks
from ..runtime.sharding.tensors import is_sharded
from .chunked_loss import chunked_cross_entropy
from .item_counts import Batch
from .own_loss import logits_of


class Logits(Enum):
    """The logits that the outputs of a forward pass must have, besides those that its loss needs."""

    NONE = "none"
    LABELLED = "labelled"  # of labelled positions, in order, of shape (1, N, V), or of all positions
    ALL = "all"


class LabelledHead:
    """Runs a model without its labels, selects the labelled positions before its head, and computes the loss.

    The loss is the mean cross entropy of the labels. Whether this is the model's own loss must be measured
    (`labelled_check`).

    Attributes:
        head: the last layer of the model.
        gives_logits: whether the outputs of the head are the logits, without a scale or a soft cap. If so, the logits
            of many positions are computed in chunks.
    """

    def __init__(self, model: nn.Module, head: nn.Module, *, shifts: bool, ignore_index: int) -> None:
        """Args:
        model: the model, not wrapped.
        head: its last layer, which projects hidden states onto the vocabulary.
        shifts: whether logits predict the next label.
        ignore_index: the label that the loss ignores.
        """
        self.gives_logits = False
        self._model, self.head, self._offset, self._ignore_index = model, head, int(shifts), ignore_index
        self._decoder_inputs: Callable[..., Tensor] | None = None
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            self._decoder_inputs = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        self._shape_BL = torch.Size()
        self._positions_N: Tensor | None = None
        self._chunked_targets_N: Tensor | None = None
        self._chunked_loss: Tensor | None = None

    def __call__(
        self,
        run: Callable[[Batch], Any],
        batch: Mapping[str, Tensor],
        n_labels: int | None = None,
        logits: Logits = Logits.LABELLED,
    ) -> tuple[Tensor, Any]:
        """Return the mean loss of a batch, and the model's outputs.

        Args:
            run: runs the model on a batch.
            n_labels: the number of labelled positions; None to count them, which waits for the device.
            logits: `LABELLED`, or `NONE` if the outputs need no logits.

        Raises:
            DataError: if the model does not return one logit for each of these positions and each word.
        """
        labels_BL = batch["labels"]
        positions_N = self._positions(labels_BL, n_labels)
        targets_N = self._targets(labels_BL, positions_N)
        in_chunks = logits is Logits.NONE and self._may_chunk()
        with self._selecting(labels_BL.shape, positions_N):
            self._chunked_targets_N = targets_N if in_chunks else None
            outputs = run(self._without_labels(batch))
            loss, self._chunked_loss = self._chunked_loss, None
        if loss is not None:
            return loss, outputs
        logits_1NV = logits_of(outputs)
        if logits_1NV.shape[:-1] != (1, len(positions_N)):
            raise DataError(
                f"The logits have the shape {tuple(logits_1NV.shape)} although {len(positions_N)} labelled positions "
                "were selected before the head. Pass `loss_head='full'`."
            )
        logits_NV = logits_1NV[0].to(torch.promote_types(logits_1NV.dtype, torch.float32))
        return F.cross_entropy(logits_NV, targets_N), outputs

    def _may_chunk(self) -> bool:
        # Chunks use the weight before the head's forward pass, in which FSDP2 gathers it. Hooks that callbacks have
        # registered read or change logits.
        if not self.gives_logits or has_forward_hooks(self._model) or has_forward_hooks(self.head):
            return False
        return not is_sharded(self._model) and not is_compiled(self._model)

    def whole(self, run: Callable[[Batch], Any], batch: Batch) -> Any:
        """Run the model on a batch as it is. A compiled model then has the same hooks as in other passes."""
        with self._selecting(torch.Size(), None):
            return run(batch)

    def targets(self, labels_BL: Tensor) -> Tensor:
        """Return the label of each of the N positions."""
        return self._targets(labels_BL, self._positions(labels_BL))

    def spread(self, values_1N: Tensor, labels_BL: Tensor) -> Tensor:
        """Return a value for each position of a batch: 0 at those without a label."""
        spread_BL = values_1N.new_zeros(labels_BL.shape)
        spread_BL.view(-1)[self._positions(labels_BL)] = values_1N[0]
        return spread_BL

    def _targets(self, labels_BL: Tensor, positions_N: Tensor) -> Tensor:
        return labels_BL.flatten()[positions_N + self._offset]

    def _positions(self, labels_BL: Tensor, n_labels: int | None = None) -> Tensor:
        """Return the places of the logits that the loss reads, in the flattened batch."""
        counted_BL = labels_BL != self._ignore_index
        if self._offset:
            counted_BL = F.pad(counted_BL[:, 1:], (0, 1), value=False)
        counted = counted_BL.flatten()
        if n_labels is None:
            return counted.nonzero()[:, 0]
        return torch.nonzero_static(counted, size=n_labels)[:, 0]

    def _without_labels(self, batch: Mapping[str, Tensor]) -> Batch:
        given = {name: value for name, value in batch.items() if name != "labels"}
        if self._decoder_inputs is not None and "decoder_input_ids" not in given:
            given["decoder_input_ids"] = self._decoder_inputs(labels=batch["labels"])
        return given

    @contextmanager
    def _selecting(self, shape_BL: torch.Size, positions_N: Tensor | None) -> Iterator[None]:
        self._shape_BL, self._positions_N = shape_BL, positions_N
        handle = self.head.register_forward_pre_hook(self._select, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._positions_N = self._chunked_targets_N = None

    def _select(
        self, _: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._positions_N is None or not inputs:
            return None
        hidden_BLH, *others = inputs
        if hidden_BLH.ndim != 3 or hidden_BLH.shape[:2] != self._shape_BL:
            return None
        hidden_NH = hidden_BLH.flatten(0, 1).index_select(0, self._positions_N)
        if self._chunked_targets_N is not None and not others and not options:
            self._positions_N = None  # chunks run the head
            self._chunked_loss = chunked_cross_entropy(self.head, hidden_NH, self._chunked_targets_N)
            if self._chunked_loss is not None:
                hidden_NH = hidden_NH[:0].detach()
        return (hidden_NH[None], *others), options
