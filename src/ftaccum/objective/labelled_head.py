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
from ..runtime.model_context import checkpoints_layers, has_graphs
from ..runtime.model_traits import is_encoder_decoder
from ..runtime.module_attributes import has_hooks_after, has_hooks_before
from ..runtime.sharding.tensors import is_sharded
from .chunked_loss import ChunkedLoss
from .compiled_selection import loss_in_graphs
from .item_counts import Batch
from .labelled_positions import LabelledPositions
from .normalizer import widened
from .own_loss import logits_of


class NeededLogits(Enum):
    """The logits that the caller of a forward pass reads from its outputs."""

    NONE = "none"
    LABELLED = "labelled"  # those of labelled positions, of shape (1, N, V), if the forward pass has a `LabelledHead`
    ALL = "all"


class LabelledHead:
    """Runs a model without its labels, selects the labelled positions before its head, and computes the loss.

    The loss is the mean cross entropy of the labels. `labelled_check` measures whether this is the model's own loss.

    Attributes:
        head: the last layer of the model.
        positions: the rule for which positions have a label.
        gives_logits: whether the model returns the outputs of its head unchanged, as logits. If so, the logits of many
            positions are computed in chunks.
        chunks: whether chunks may be used.
    """

    def __init__(self, model: nn.Module, head: nn.Module, positions: LabelledPositions) -> None:
        """Args:
        model: the model, not wrapped.
        head: its last layer, which projects hidden states onto the vocabulary.
        positions: those that have a label.
        """
        self.head, self.positions, self.gives_logits, self.chunks = head, positions, False, True
        self._model = model
        self._around = modules_around(model, head)
        self._chunked_loss = ChunkedLoss(head, saves_memory=checkpoints_layers(model))
        self._decoder_inputs: Callable[..., Tensor] | None = None
        if is_encoder_decoder(model):
            self._decoder_inputs = getattr(model, "prepare_decoder_input_ids_from_labels", None)

    def __call__(
        self,
        run: Callable[[Batch], Any],
        batch: Mapping[str, Tensor],
        n_labels: int | None = None,
        needs: NeededLogits = NeededLogits.LABELLED,
    ) -> tuple[Tensor, Any]:
        """Return the mean loss of a batch, and the model's outputs.

        Args:
            run: runs the model on a batch.
            n_labels: the number of labelled positions; None to count them, which waits for the device.
            needs: `LABELLED`, or `NONE` if nobody reads the logits of the outputs.

        Raises:
            DataError: if the model does not return the logits of the selected positions.
        """
        labels_BL = batch["labels"]
        if has_graphs(self._model):
            drops_logits = needs is NeededLogits.NONE and self.gives_logits and not self._is_hooked()
            unlabelled = self._without_labels(batch)
            return loss_in_graphs(
                lambda: run(unlabelled), self.head, self.positions, labels_BL, n_labels, drops_logits=drops_logits
            )
        places_N = self.positions.places(labels_BL, n_labels)
        targets_N = self.positions.targets(labels_BL, places_N)
        in_chunks = needs is NeededLogits.NONE and self._may_chunk()
        selection = _Selection(labels_BL.shape, places_N, targets_N, self._chunked_loss if in_chunks else None)
        handle = self.head.register_forward_pre_hook(selection, with_kwargs=True)
        try:
            outputs = run(self._without_labels(batch))
        finally:
            handle.remove()
        if selection.loss is not None:
            return selection.loss, outputs
        logits_1NV = logits_of(outputs)
        if logits_1NV.shape[:-1] != (1, len(places_N)):
            raise DataError(
                f"The logits have the shape {tuple(logits_1NV.shape)} although {len(places_N)} labelled positions "
                "were selected before the head. Pass `loss_head='full'`."
            )
        return F.cross_entropy(widened(logits_1NV[0]), targets_N), outputs

    @contextmanager
    def chunks_of(self, n_positions: int) -> Iterator[None]:
        """Compute the loss in chunks of so many positions, until exit."""
        before, self._chunked_loss = self._chunked_loss, ChunkedLoss(self.head, n_positions)
        try:
            yield
        finally:
            self._chunked_loss = before

    def _may_chunk(self) -> bool:
        # Chunks use the weight before the forward pass of the head, in which FSDP2 gathers it.
        return self.chunks and self.gives_logits and not self._is_hooked() and not is_sharded(self._model)

    def _is_hooked(self) -> bool:
        # Hooks that callbacks have registered since the check read or change logits, and those before the head would
        # run in each chunk, too.
        return has_hooks_before(self.head) or any(map(has_hooks_after, self._around))

    def _without_labels(self, batch: Mapping[str, Tensor]) -> Batch:
        given = {name: value for name, value in batch.items() if name != "labels"}
        if self._decoder_inputs is not None and "decoder_input_ids" not in given:
            given["decoder_input_ids"] = self._decoder_inputs(labels=batch["labels"])
        return given


class _Selection:
    """A hook before the head that selects positions in one forward pass of the model.

    Attributes:
        loss: the loss, if it was computed in chunks; else None.
    """

    def __init__(
        self, shape_BL: torch.Size, places_N: Tensor, targets_N: Tensor, chunked_loss: ChunkedLoss | None
    ) -> None:
        """Args:
        chunked_loss: computes the loss in chunks; None to compute it from the outputs of the head.
        """
        self.loss: Tensor | None = None
        self._shape_BL, self._places_N, self._targets_N = shape_BL, places_N, targets_N
        self._chunked_loss, self._is_inside = chunked_loss, False

    def __call__(
        self, _: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the inputs of the head at the labelled positions; None to leave them as they are."""
        if self._is_inside or not inputs:
            return None
        hidden_BLH, *others = inputs
        if hidden_BLH.ndim != 3 or hidden_BLH.shape[:2] != self._shape_BL:
            return None
        hidden_NH = hidden_BLH.flatten(0, 1).index_select(0, self._places_N)
        if self._chunked_loss is not None and not others and not options:
            self._is_inside = True  # chunks run the head
            self.loss = self._chunked_loss(hidden_NH, self._targets_N)
            self._is_inside = False
            if self.loss is not None:
                hidden_NH = hidden_NH[:0].detach()
        return (hidden_NH[None], *others), options


def modules_around(model: nn.Module, head: nn.Module) -> list[nn.Module]:
    """Return the modules that contain a module, and the module itself."""
    return [module for module in model.modules() if any(inner is head for inner in module.modules())]
