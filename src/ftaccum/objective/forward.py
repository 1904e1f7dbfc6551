"""From a model and a batch to the named means of the loss."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import DataError, SettingsError
from ..runtime.state_guards import training_mode
from .aux_losses import factors_of, has_parts
from .inner_gradients import InnerGradients
from .item_counts import IGNORE_INDEX, Batch, targets_of
from .own_loss import LOSS, OwnLoss
from .span_loss import is_span_loss, span_losses

LossFn = Callable[[Any, Any], Any]


class Forward:
    """Runs a model on a batch and reads its loss: the model's own, the user's `loss_fn`, or the next-token loss.

    Which of them is settled once, from what `forward` takes and the batch carries.
    """

    def __init__(self, model: nn.Module, batch: Batch, loss_fn: LossFn | None, *, token_ids: bool = False) -> None:
        """Args:
            model: before it is wrapped for several processes.
            batch: a collated batch, to see what it carries.
            loss_fn: `loss_fn(outputs, targets)` on tuples, `loss_fn(outputs, batch)` on mappings, or None.
            token_ids: whether the rows were token ids and nothing else, each the target of the one before.

        Raises:
            DataError: where no loss can come of model and batch, with what is missing.
        """
        self.accepted = accepted_arguments(model)
        self.modules = (
            [loss_fn] if isinstance(loss_fn, nn.Module) else []
        )  # those that compute the loss besides the model
        self.factors: dict[str, float] = {}  # of outputs that the model's own loss has added to it, by name
        # Some models of Transformers compute a loss without labels, but only if they are asked to.
        self._flags = {"return_loss": True} if loss_fn is not None and "return_loss" in (self.accepted or ()) else {}
        self._inner_gradients = InnerGradients()
        self._own_loss = OwnLoss()
        self.has_spans = False  # whether the terms are the loss of starts and that of ends
        self._read_loss = self._settle(model, batch, loss_fn, token_ids)
        self._needs_labels = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        # An encoder-decoder makes its decoder's inputs from the labels, so it gets them beside a `loss_fn`, too.
        self._withheld = set() if self.is_own or self._needs_labels else {"labels"}

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        """Return the means by term, scalars, and the model's outputs. The batch may be changed by both."""
        return self._inner_gradients.run(lambda: self._means(model, batch))

    def _means(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        outputs = self._outputs(model, batch)
        loss: Any = span_losses(outputs, batch) if self.has_spans else self._loss_of(model, outputs, batch)
        if self.factors:
            # In eval mode a model may leave some out.
            given = {
                name: factor * outputs[name] for name, factor in self.factors.items() if outputs.get(name) is not None
            }
            loss = {LOSS: loss - sum(given.values()), **{name: given.get(name, 0 * loss) for name in self.factors}}
        means = dict(loss) if isinstance(loss, Mapping) else {LOSS: loss}
        return {term: _scalar(term, mean) for term, mean in means.items()}, outputs

    def unweighted_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a batch as the model or `loss_fn` gives it, the sum of its terms. Nothing measured takes
        part in it."""
        loss = self._loss_of(model, self._outputs(model, batch), batch)
        terms = loss if isinstance(loss, Mapping) else {LOSS: loss}
        means = [_scalar(term, mean) for term, mean in terms.items()]
        return torch.stack(means).sum() if means else torch.zeros(())

    def _loss_of(self, model: nn.Module, outputs: Any, batch: Batch) -> Any:
        """Return the loss as it is given: a number, or a mapping of them."""
        if self._read_loss is None:
            return self._own_loss(outputs, training=model.training)
        return self._read_loss(outputs, batch)

    def settle_outputs(self, model: nn.Module, batch: Callable[[], Batch]) -> None:
        """Settle which of the outputs is the model's own loss, in eval mode and in train mode.

        Args:
            batch: returns a batch of several rows, so that no prediction is a single number.
        """
        for training in (False, True):
            with training_mode(model, training=training):
                outputs = self._inner_gradients.run(lambda: self._outputs(model, batch())) if self.is_own else None
                if isinstance(outputs, list | tuple):
                    with torch.enable_grad():  # of several numbers, one is computed from the others
                        self._own_loss.settle(self._outputs(model, batch()), training=training)

    def take_apart(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        """Split the model's loss into the terms that its outputs name: a router's balance over its experts is no mean
        over labels, whatever the rest is.

        Args:
            batches: a few small ones, to run with gradients. Outputs whose factor is not the same in all are left in.
        """
        with torch.enable_grad():
            found = [factors_of(outputs, LOSS) for outputs in (self._outputs(model, batch) for batch in batches)]
        self.factors = {name: factor for name, factor in found[0].items() if all(f.get(name) == factor for f in found)}

    def split_spans(self, model: nn.Module, batch: Batch) -> None:
        """Make two terms of the loss of a question-answering head, where it is the sum of two means on this batch."""
        if self.is_own:
            outputs = self._outputs(model, batch)
            self.has_spans = is_span_loss(outputs, self._loss_of(model, outputs, batch), batch)

    def may_have_parts(self, outputs: Any) -> bool:
        """Whether the outputs hold numbers that the model's own loss may be the sum of."""
        return self.is_own and has_parts(outputs, LOSS)

    @property
    def parts(self) -> tuple[str, ...]:
        """The terms that are outputs of the model's, which its loss has added."""
        return tuple(self.factors)

    @property
    def is_own(self) -> bool:
        """Whether the loss is the model's own."""
        return self._read_loss is None

    @property
    def counted_by(self) -> str | None:
        """The way to count, where the loss is computed here and needs no measuring."""
        return "labels after the shift" if self._read_loss is _next_token_loss else None

    def n_classes(self, model: nn.Module, batch: Batch) -> int | None:
        """Return how many classes the targets choose from, read off the logits that the model gives without labels, or
        with them if it makes inputs of them. None where the targets are no class numbers, or there are no logits."""
        targets = targets_of(batch)
        if targets is None or targets.is_floating_point():
            return None
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if isinstance(ids, Tensor) and ids.ndim == 3:  # multiple choice: each row has its own number of choices
            return None
        given = batch if self._needs_labels else _without_labels(batch)
        try:
            outputs = self._inner_gradients.run(lambda: self._outputs(model, given))
            logits = logits_of(outputs)
        except Exception:  # the model needs the labels, or has no logits
            return None
        return logits.shape[-1] if logits.shape[:-1] == targets.shape and logits.shape[-1] > 1 else None

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
        return model(batch["input_ids"], **given)  # a plain module may name its token ids as it likes

    def _settle(
        self, model: nn.Module, batch: Batch, loss_fn: LossFn | None, token_ids: bool
    ) -> Callable[[Any, Batch], Any] | None:
        """Return what reads the loss; None where it is the model's own."""
        name = type(model).__name__
        if loss_fn is not None:
            return lambda outputs, batch: loss_fn(outputs, batch if isinstance(batch, Mapping) else batch[1])
        if isinstance(batch, list) and batch and isinstance(batch[0], Mapping):
            raise DataError(
                f"`data_collator` must give a dict of tensors, or (inputs, targets), but gives a list of {len(batch)} "
                "dicts instead. Have it stack them, as `transformers.DataCollatorWithPadding` does."
            )
        if not isinstance(batch, Mapping):
            raise DataError(
                "`train_data` gives (inputs, targets) tuples, but `loss_fn` is None. "
                "Give the loss that compares them, such as `loss_fn=torch.nn.CrossEntropyLoss()`."
            )
        labels = [key for key in batch if is_label(key)]
        if any(self.accepted is None or key in self.accepted for key in labels):
            return None
        if token_ids:
            return _next_token_loss
        raise DataError(
            f"`train_data` carries {sorted(map(str, batch))}, from which {name} computes no loss: it has "
            f"{'label columns ' + str(labels) + ' that forward does not take' if labels else 'no label column'}. "
            "Name the labels as `forward` does, or give a `loss_fn`; for a model that computes its loss without "
            "labels, `loss_fn=lambda outputs, batch: outputs.loss`."
        )


def accepted_arguments(model: nn.Module) -> set[str] | None:
    """The names that `forward` takes; None where it takes any. A PEFT model takes what its base model takes.

    A model of Transformers names what it uses; what its `**kwargs` take goes on to its attention.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    parameters = inspect.signature(base.forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return None if takes_any and not isinstance(base, PreTrainedModel) else named


def is_label(column: str) -> bool:
    """Whether Transformers' heads would name a target so (`labels`, `start_positions`, …)."""
    return "label" in column or column in ("start_positions", "end_positions")


def logits_of(outputs: Any) -> Tensor:
    """The logits in a model's outputs: the tensor itself, `.logits`, or the first tensor that is no number."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        named = outputs.get("logits")
        if named is not None:
            return named
        outputs = [value for key, value in outputs.items() if key != LOSS]
    found = [value for value in outputs if isinstance(value, Tensor) and value.ndim]
    if not found:
        raise DataError("The model's outputs hold no logits. Give a `loss_fn` that reads what they hold.")
    return found[0]


def _without_labels(batch: Batch) -> Batch:
    return {k: v for k, v in batch.items() if not is_label(k)} if isinstance(batch, Mapping) else batch


def _next_token_loss(outputs: Any, batch: Batch) -> Tensor:
    """Mean cross entropy of token t+1 under the logits at t, ignored labels left out."""
    logits_BLV, labels_BL = logits_of(outputs), batch["labels"]
    if logits_BLV.ndim != 3 or logits_BLV.shape[:2] != labels_BL.shape:
        raise DataError(
            f"For the next-token loss the model must give logits of shape (rows, length, vocabulary), but gives "
            f"{tuple(logits_BLV.shape)} for token ids of shape {tuple(labels_BL.shape)}. Give a `loss_fn`."
        )
    logits_NV = logits_BLV[:, :-1].flatten(0, 1)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(logits_NV, labels_BL[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


def _scalar(term: str, mean: Any) -> Tensor:
    if not isinstance(mean, Tensor) or mean.numel() != 1:
        shape = tuple(mean.shape) if isinstance(mean, Tensor) else type(mean).__name__
        raise SettingsError(
            [
                f"`loss_fn` must give one number, or a dict of them, but {term!r} is {shape} instead. "
                "Reduce it to a mean, or to a sum with `reduction='sum'`."
            ]
        )
    return mean.reshape(())
