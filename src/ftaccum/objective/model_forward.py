"""The forward pass of a model on a batch of rows, with the model's own loss, the user's or the next-token loss."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import DataError
from ..runtime.adapters import base_of
from ..runtime.model_traits import is_encoder_decoder
from .forward import Forward
from .item_counts import AFTER_SHIFT, IGNORE_INDEX, Batch, targets_of
from .normalizer import widened
from .own_loss import logits_of

LossFn = Callable[[Any, Any], Any]


class ModelForward(Forward):
    """A forward pass with its loss: the model's own, the user's `loss_fn`, or the next-token loss.

    Which of the three to use is decided once, from the arguments of `forward` and the columns of a batch.

    Attributes:
        accepted: the names of the arguments that `forward` takes; None if it takes any.
        loss_fn: the function that computes the loss; None for the model's own and for the next-token loss.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        loss_fn: LossFn | None,
        *,
        token_ids: bool = False,
        source: str = "`train_data`",
    ) -> None:
        """Args:
            model: the model, not yet wrapped for several processes.
            batch: a collated batch, whose columns decide which loss to use.
            loss_fn: `loss_fn(outputs, targets)` for tuples, `loss_fn(outputs, batch)` for mappings, or None.
            token_ids: whether rows contain only token ids, so that each token is the target of the token before it.
            source: how messages name the data.

        Raises:
            DataError: if the model and the batch give no loss. The message says what is missing.
        """
        self.accepted, self.loss_fn, self._source = accepted_arguments(model), loss_fn, source
        super().__init__(
            [loss_fn] if isinstance(loss_fn, nn.Module) else [], self._settle(model, batch, loss_fn, token_ids)
        )
        # Some Transformers models compute a loss without labels, but only on request.
        self._flags = {"return_loss": True} if loss_fn is not None and "return_loss" in (self.accepted or ()) else {}
        self._needs_labels = is_encoder_decoder(model)
        # An encoder-decoder makes its decoder's inputs from the labels, so it needs them even with a `loss_fn`.
        self._withheld = set() if self.is_own or self._needs_labels else {"labels"}

    @property
    def state(self) -> Mapping[str, Any]:
        return {"loss_fn": self.loss_fn}

    @property
    def counted_by(self) -> str | None:
        """The way to count, if it is known: only for the next-token loss, which is computed here."""
        return AFTER_SHIFT if self._read_loss is _next_token_loss else None

    def n_classes(self, model: nn.Module, batch: Batch) -> int | None:
        """Return how many classes the targets choose from, read off the model's logits.

        The model runs without labels, unless it makes inputs from them. Return None if the targets are no class
        numbers, or if there are no logits.
        """
        if not _chooses(batch):
            return None
        given = batch if self._needs_labels else _without_labels(batch)
        try:
            outputs = self._inner_gradients.run(lambda: self._outputs(model, given))
            return _classes_of(logits_of(outputs), batch)
        except Exception:  # the model needs the labels, or has no logits
            return None

    def _outputs(self, model: nn.Module, batch: Batch) -> Any:
        if not isinstance(batch, Mapping):
            inputs = batch[0]
            if isinstance(inputs, Mapping):
                return model(**inputs)
            return model(*inputs) if isinstance(inputs, list | tuple) else model(inputs)
        given = {**self._flags, **{name: value for name, value in batch.items() if name not in self._withheld}}
        if self.accepted is not None:
            given = {name: value for name, value in given.items() if name in self.accepted}
        if "input_ids" in given or "input_ids" not in batch:
            return model(**given)
        return model(batch["input_ids"], **given)  # a plain module may give its token ids any name

    def _settle(
        self, model: nn.Module, batch: Batch, loss_fn: LossFn | None, token_ids: bool
    ) -> Callable[[Any, Batch], Any] | None:
        """Return the function that reads the loss; None for the model's own loss."""
        name = type(model).__name__
        if loss_fn is not None:
            return lambda outputs, batch: loss_fn(outputs, batch if isinstance(batch, Mapping) else batch[1])
        if isinstance(batch, list) and batch and isinstance(batch[0], Mapping):
            raise DataError(
                "`data_collator` must return a dict of tensors, or (inputs, targets), but returns a list of "
                f"{len(batch)} dicts instead. Let it stack them, as `transformers.DataCollatorWithPadding` does."
            )
        if not isinstance(batch, Mapping):
            raise DataError(
                f"{self._source} gives (inputs, targets) tuples, but `loss_fn` is None. "
                "Give a loss that compares outputs with targets, such as `loss_fn=torch.nn.CrossEntropyLoss()`."
            )
        labels = [key for key in batch if is_label(key)]
        if any(self.accepted is None or key in self.accepted for key in labels):
            return None
        if token_ids:
            return _next_token_loss
        raise DataError(
            f"{self._source} has the columns {sorted(map(str, batch))}, and {name} computes no loss from them: they "
            f"have {'label columns ' + str(labels) + ' that forward does not take' if labels else 'no label column'}. "
            "Name the column of labels as in `forward`, mostly `labels`, or give a `loss_fn`; for a model that "
            "computes its loss without labels, `loss_fn=lambda outputs, batch: outputs.loss`."
        )


def n_classes_in(outputs: Any, batch: Batch) -> int | None:
    """Return how many classes the targets choose from, read off the outputs of a pass with these targets.

    Return None if the outputs are neither a tensor nor a mapping with logits, or if the targets are no class numbers.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
    return _classes_of(logits, batch) if isinstance(logits, Tensor) and _chooses(batch) else None


def _chooses(batch: Batch) -> bool:
    """Return whether the targets of a batch may be class numbers."""
    targets = targets_of(batch)
    if targets is None or targets.is_floating_point():
        return False
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return not (isinstance(ids, Tensor) and ids.ndim == 3)  # multiple choice: each row has its own number of choices


def _classes_of(logits: Tensor, batch: Batch) -> int | None:
    targets = targets_of(batch)
    assert targets is not None, "targets that may be class numbers"
    return logits.shape[-1] if logits.shape[:-1] == targets.shape and logits.shape[-1:] > (1,) else None


def accepted_arguments(model: nn.Module) -> set[str] | None:
    """Return the argument names that `forward` takes; None if it takes any. For a PEFT model, ask its base model.

    A Transformers model names the arguments that it uses, and passes its `**kwargs` on to the attention.
    """
    base = base_of(model)
    parameters = inspect.signature(base.forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return None if takes_any and not isinstance(base, PreTrainedModel) else named


def is_label(column: str) -> bool:
    """Return whether a column has the name of a target in Transformers (`labels`, `start_positions`, …)."""
    return "label" in column or column in ("start_positions", "end_positions")


def _without_labels(batch: Batch) -> Batch:
    return {k: v for k, v in batch.items() if not is_label(k)} if isinstance(batch, Mapping) else batch


def _next_token_loss(outputs: Any, batch: Batch) -> Tensor:
    """Return the mean cross entropy of token t+1 under the logits at t, without ignored labels."""
    logits_BLV, labels_BL = logits_of(outputs), batch["labels"]
    if logits_BLV.ndim != 3 or logits_BLV.shape[:2] != labels_BL.shape:
        raise DataError(
            f"For the next-token loss, the model must return logits of shape (rows, length, vocabulary), but returns "
            f"{tuple(logits_BLV.shape)} for token ids of shape {tuple(labels_BL.shape)}. Give a `loss_fn`."
        )
    logits_NV = widened(logits_BLV[:, :-1].flatten(0, 1))
    return F.cross_entropy(logits_NV, labels_BL[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
