"""The reference: the loss of many rows in one batch, computed only from the user's model and rows.

It uses nothing that ftaccum measures or infers: no count of loss items, no choice of terms, no split of the loss into
parts, no guess about packing. So it can disagree with training. It shares with training only parts that do not decide
the loss: how rows are read (and raw text is tokenized), the random seed of collators, the device, and the argument
names of `forward`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.batches import can_be_taken_apart, first_dimensions, take
from ...data.dataset import Rows
from ...errors import DataError
from ...objective.batch_changes import fresh_batch
from ...objective.model_forward import LossFn, accepted_arguments, is_label
from ...runtime.state_guards import preserve_rng, seed_all
from ...training.config import Components
from ...training.declared import ignore_index_of
from .plain_collation import PlainCollator, documents_of
from .precision import cast

Batch = Any
_IGNORED = -100


@dataclass(frozen=True)
class Reference:
    """The loss of rows in one batch: collated again, passed to the model in a plain call, with the user's own loss.

    Attributes:
        components: the user's model, collator, loss function and count of loss items.
        rows: the rows of training.
        seed: the seed for random draws of rows and collator, as in training.
        device: the device of the model.
        loss_fn: the loss that `class_weights` and `label_smoothing` define; None for that of `components`.
        over_window: whether the loss reads all rows of a window together (`loss_over`).
    """

    components: Components
    rows: Rows
    seed: tuple[int, ...]
    device: torch.device
    loss_fn: LossFn | None = None
    over_window: bool = False

    def batch(self, positions: Sequence[int], *, backwards: bool = False, dtype: torch.dtype | None = None) -> Batch:
        """Collate rows with the user's collator, or with a plain one if the user gave none.

        Args:
            positions: the positions of the rows.
            backwards: whether to reverse the order of the rows.
            dtype: the type of floating-point tensors in the batch; None to keep theirs.
        """
        with preserve_rng():
            seed_all(*self.seed)
            fetched = [self._kept_columns(row) for row in self.rows.fetch(positions, self.seed)]
            batch = self._collated(fetched)
        # Reverse the rows after collating, so that a collator makes the same random draws for each row.
        return cast(_backwards(batch) if backwards else batch, dtype)

    def loss(self, batch: Batch, *, backwards: bool = False) -> Tensor:
        """Return the loss of a batch, with its graph.

        If `reduction` is "sum", each term is divided by the user's `count_items`. Without `count_items`, the documented
        rule applies: the divisor is the number of labels that are not ignored, of elements of a floating-point target,
        or of rows.

        Args:
            backwards: whether the rows of the batch are reversed. A loss over the window gets them in their own order,
                which it may depend on.
        """
        batch = fresh_batch(batch, self.device)
        outputs = self._outputs(batch)
        if self.over_window:
            loss = self._loss_over_window(self._inputs(outputs, batch), batch, backwards=backwards)
        else:
            loss = self._loss_of(outputs, batch)
        terms = dict(loss) if isinstance(loss, Mapping) else {"loss": loss}
        if self.components.reduction == "sum":
            # Count after the forward pass, which may change the labels.
            counts = self._counts(batch, terms)
            terms = {name: term / counts[name] for name, term in terms.items()}
        return _added_up([term.reshape(()) for term in terms.values()])

    def can_run(self, batch: Batch) -> bool:
        """Return whether the model, and a loss that reads single micro-batches, can run on a batch.

        Batch norm, for example, rejects a single row in train mode.
        """
        try:
            if self.over_window:
                batch = fresh_batch(batch, self.device)
                self._inputs(self._outputs(batch), batch)
            else:
                self.loss(batch)
        except ValueError:
            return False
        return True

    def _kept_columns(self, row: Any) -> Any:
        """Return a row without its text columns, which cannot become tensors. A row without any column that the model
        accepts stays whole."""
        if not isinstance(row, Mapping) or not self._accepted & row.keys():
            return row
        return {name: value for name, value in row.items() if name in self._accepted or not _is_text(value)}

    def _collated(self, rows: list[Any]) -> Batch:
        components = self.components
        plain = PlainCollator(
            None if components.loss_fn or components.count_items else accepted_arguments(components.model),
            pad_token_id=components.pad_token_id,
            ignore_index=self._ignore_index,
            on_the_left=components.padding_side == "left",
        )
        if components.data_collator is None:
            return plain([document for row in rows for document in documents_of(row)])
        batch = components.data_collator(rows)
        if not isinstance(batch, Mapping):
            return batch
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) > 1:
            return batch
        documents = documents_of({n: v[0] for n, v in batch.items() if isinstance(v, Tensor) and v.shape == ids.shape})
        return batch if len(documents) == 1 else plain(documents)

    def _outputs(self, batch: Batch) -> Any:
        model = self.components.model
        if not isinstance(batch, Mapping):
            inputs = batch[0]
            if isinstance(inputs, Mapping):
                return model(**inputs)
            return model(*inputs) if isinstance(inputs, list | tuple) else model(inputs)
        accepted = accepted_arguments(model)
        given = {name: value for name, value in batch.items() if accepted is None or name in accepted}
        if self._loss_fn is not None and not _is_encoder_decoder(model):
            given.pop("labels", None)  # an encoder-decoder makes its decoder's inputs from them
        if "input_ids" in batch and "input_ids" not in given:
            return model(batch["input_ids"], **given)
        return model(**given)

    def _loss_of(self, outputs: Any, batch: Batch) -> Any:
        if self._loss_fn is not None:
            return self._loss_fn(outputs, batch if isinstance(batch, Mapping) else batch[1])
        if self._takes_labels(batch):
            return _own_loss(outputs)
        logits, labels = _logits(outputs), batch["labels"]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED)

    def _inputs(self, outputs: Any, batch: Batch) -> Any:
        """Return what a loss over the window reads besides the batch."""
        if self.components.loss_inputs is not None:
            return self.components.loss_inputs(outputs, batch)
        return dict(outputs) if isinstance(outputs, Mapping) else outputs

    def _loss_over_window(self, inputs: Any, batch: Batch, *, backwards: bool) -> Any:
        assert self.components.loss_fn is not None, "checked with the arguments"
        if backwards and (reversed_batch := _backwards(batch)) is not batch:
            batch, inputs = reversed_batch, _rows_reversed(inputs)
        return self.components.loss_fn(inputs, batch if isinstance(batch, Mapping) else batch[1])

    def _takes_labels(self, batch: Batch) -> bool:
        accepted = accepted_arguments(self.components.model)
        return any(is_label(name) and (accepted is None or name in accepted) for name in batch)

    def _counts(self, batch: Batch, terms: Mapping[str, Tensor]) -> Mapping[str, Any]:
        count_items = self.components.count_items
        counted = _counted_plainly(batch, self._ignore_index) if count_items is None else count_items(batch)
        return counted if isinstance(counted, Mapping) else dict.fromkeys(terms, counted)

    @property
    def _loss_fn(self) -> LossFn | None:
        return self.components.loss_fn if self.loss_fn is None else self.loss_fn

    @property
    def _ignore_index(self) -> int:
        return ignore_index_of(self.components, self.rows)

    @property
    def _accepted(self) -> set[str]:
        return accepted_arguments(self.components.model) or set()


def _own_loss(outputs: Any) -> Tensor:
    """Return `loss` of a model's outputs, or the only scalar in a tuple of outputs.

    Raises:
        DataError: if there is no `loss`, and no scalar or several.
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is not None:
        return loss
    several = outputs if isinstance(outputs, list | tuple) else ()
    numbers = [value for value in several if isinstance(value, Tensor) and value.ndim == 0]
    if len(numbers) != 1:
        raise DataError(
            f"The model returns a {type(outputs).__name__} without a `loss` and with {len(numbers)} scalars, so its "
            "loss cannot be identified. Give `loss_fn=lambda outputs, batch: outputs[…]`."
        )
    return numbers[0]


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    return outputs[0] if isinstance(outputs, list | tuple) else outputs["logits"]


def _added_up(terms: list[Tensor]) -> Tensor:
    """Return the sum of the terms that are not NaN, as the mean over no loss items is."""
    known = [term for term in terms if not term.isnan()]
    return torch.stack(known or terms).sum()


def _counted_plainly(batch: Batch, ignore_index: int) -> int:
    targets = batch.get("labels") if isinstance(batch, Mapping) else batch[1]
    if not isinstance(targets, Tensor):
        return len(next(value for value in batch.values() if isinstance(value, Tensor)))
    return targets.numel() if targets.is_floating_point() else int((targets != ignore_index).sum())


def _backwards(batch: Batch) -> Batch:
    """Return a batch with its rows reversed; unchanged, if its tensors differ in their numbers of rows."""
    n_rows = max(first_dimensions(batch))
    return take(batch, range(n_rows)[::-1]) if can_be_taken_apart(batch, n_rows) else batch


def _rows_reversed(inputs: Any) -> Any:
    return {n: value.flip(0) for n, value in inputs.items()} if isinstance(inputs, Mapping) else inputs.flip(0)


def _is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _is_text(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, str | bytes) or value is None
