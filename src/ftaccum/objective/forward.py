"""A forward pass with its loss, as named means."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingsError
from ..runtime.state_guards import training_mode
from .aux_losses import factors_of, has_parts
from .inner_gradients import InnerGradients
from .item_counts import Batch
from .labelled_head import LabelledHead, NeededLogits
from .last_layer import LastLayer
from .normalizer import Counts
from .own_loss import LOSS, OwnLoss
from .span_loss import is_span_loss, span_losses


class Forward(ABC):
    """A forward pass of a model on a batch, and the loss that it gives, as a mean or several named means.

    Subclasses run the model. This class reads the loss from what they return, and splits it into terms.

    Attributes:
        modules: the modules that compute the loss, besides the model.
        factors: the outputs that the model's own loss adds up, with their factors.
        has_spans: whether the terms are the losses of start and end positions.
        labelled_head: computes logits only at labelled positions; None if the model computes them all.
        last_layer: the layer that need not be computed at all positions; None if it must.
        is_lazy: whether passes with gradients compute it only at the positions that are read.
    """

    def __init__(self, modules: Sequence[nn.Module], read_loss: Callable[[Any, Batch], Any] | None) -> None:
        """Args:
        read_loss: returns the loss, given the outputs and the batch; None if the outputs contain it.
        """
        self.modules = list(modules)
        self.factors: dict[str, float] = {}
        self.has_spans = False
        self.labelled_head: LabelledHead | None = None
        self.last_layer: LastLayer | None = None
        self.is_lazy = False
        self._inner_gradients = InnerGradients()
        self._own_loss = OwnLoss()
        self._is_open_in_train_mode = False  # whether the first pass in train mode decides where the loss is
        self._read_loss = read_loss

    @property
    def counted_by(self) -> str | None:
        """The way to count the loss items, if it is known."""
        return None

    @property
    def state(self) -> Mapping[str, Any]:
        """The functions and modules whose state decides how the loss is computed, besides the model, by name."""
        return {f"loss module {n}": module for n, module in enumerate(self.modules)}

    @abstractmethod
    def _outputs(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model on a batch and return its outputs."""

    def __call__(
        self, model: nn.Module, batch: Batch, counts: Counts | None = None, needs: NeededLogits = NeededLogits.ALL
    ) -> tuple[dict[str, Tensor], Any]:
        """Return the means by term, as scalars, and the model's outputs. The model or the loss may change the batch.

        Args:
            counts: the batch's number of loss items by term, if known.
            needs: the logits that the caller reads from the outputs.
        """
        return self._inner_gradients.run(lambda: self._means(model, batch, counts, needs))

    def outputs(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model on a batch and return its outputs, without computing the loss."""
        return self._inner_gradients.run(lambda: self._outputs(model, batch))

    def _means(
        self, model: nn.Module, batch: Batch, counts: Counts | None, needs: NeededLogits
    ) -> tuple[dict[str, Tensor], Any]:
        if self.labelled_head is not None and needs is not NeededLogits.ALL:
            n_labels = int(counts[LOSS]) if counts and counts[LOSS] else None
            mean, outputs = self.labelled_head(lambda given: self._outputs(model, given), batch, n_labels, needs)
            return {LOSS: mean, **self._parts(outputs, mean)}, outputs
        outputs = self._outputs_for_loss(model, batch)
        loss: Any = span_losses(outputs, batch) if self.has_spans else self._loss_of(model, outputs, batch)
        if self.factors:
            parts = self._parts(outputs, loss)
            loss = {LOSS: loss - sum(parts.values()), **parts}
        return scalars_of(loss), outputs

    def _outputs_for_loss(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model on a batch and return its outputs, with a lazy last layer if that is wanted and possible."""
        if self.last_layer is None or not self.is_lazy or not torch.is_grad_enabled():
            return self._outputs(model, batch)
        with self.last_layer.lazily():
            return self._outputs(model, batch)

    def _parts(self, outputs: Any, loss: Tensor) -> dict[str, Tensor]:
        """Return the terms that the model's own loss adds up, with 0 for those that it omits, as some do in eval mode.

        Args:
            loss: any term of the loss.
        """
        found = {name: outputs.get(name) for name in self.factors}
        return {name: 0 * loss if found[name] is None else self.factors[name] * found[name] for name in self.factors}

    def unweighted_loss(self, model: nn.Module, batch: Batch, places: Sequence[int] = ()) -> Tensor:  # noqa: ARG002
        """Return the loss of a batch as the model or `loss_fn` returns it, with its terms added up.

        It uses no counts or factors that were measured.

        Args:
            places: the positions of the rows in their window, if the loss depends on it.
        """
        return total_of(self._loss_of(model, self._outputs(model, batch), batch))

    def _loss_of(self, model: nn.Module, outputs: Any, batch: Batch) -> Any:
        """Return the loss as given: a number, or a mapping from terms to numbers."""
        if self._read_loss is None:
            if model.training and self._is_open_in_train_mode:
                self._is_open_in_train_mode = False
                self._find_loss(model, outputs, batch)
            return self._own_loss(outputs, training=model.training)
        return self._read_loss(outputs, batch)

    def settle_outputs(self, model: nn.Module, batch: Callable[[], Batch]) -> None:
        """Find the model's own loss among its outputs, in eval mode and in train mode.

        Args:
            batch: returns a batch of several rows, so that no prediction is a single number.
        """
        for training in (False, True):
            with training_mode(model, training=training):
                if self.is_own:
                    outputs = self._inner_gradients.run(lambda: self._outputs(model, batch()))
                    self._find_loss(model, outputs, batch())

    def _find_loss(self, model: nn.Module, outputs: Any, batch: Batch) -> None:
        """Find the loss among these outputs without names, in the mode that the model is in."""
        if isinstance(outputs, list | tuple):
            with torch.enable_grad():  # the graph shows which number is computed from the others
                self._own_loss.settle(self._outputs(model, batch), training=model.training)

    def first_means(
        self, model: nn.Module, batch: Batch, again: Callable[[], Batch], *, may_split: bool
    ) -> tuple[dict[str, Tensor], Any]:
        """Run several rows in eval mode, find the loss among the outputs, and return the means and the outputs.

        If the outputs name the loss, the first pass in train mode decides where it is in train mode.

        Args:
            batch: several rows, so that no prediction is a single number.
            again: returns the same rows for another pass.
            may_split: whether to split the loss of a question-answering head into two terms, if it is the sum of two
                means on these rows.
        """
        if not self.is_own:
            return self(model, batch)
        outputs = self.outputs(model, batch)
        self._is_open_in_train_mode = not isinstance(outputs, list | tuple)
        if not self._is_open_in_train_mode:
            self.settle_outputs(model, again)
        loss = self._own_loss(outputs, training=False)
        if may_split and is_span_loss(outputs, loss, batch):
            self.has_spans = True
            loss = span_losses(outputs, batch)
        return scalars_of(loss), outputs

    def take_apart(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        """Split off the terms that the model's own loss adds up and its outputs name.

        For example, a router's balance over its experts is no mean over labels, even if the rest of the loss is.

        Args:
            batches: a few small batches to run with gradients. Outputs whose factor differs between them stay in the
                main term.
        """
        with torch.enable_grad():
            found = [factors_of(outputs, LOSS) for outputs in (self._outputs(model, batch) for batch in batches)]
        self.factors = {name: factor for name, factor in found[0].items() if all(f.get(name) == factor for f in found)}

    def may_have_parts(self, outputs: Any) -> bool:
        """Return whether the outputs hold numbers that the model's own loss may add up."""
        return self.is_own and has_parts(outputs, LOSS)

    @property
    def parts(self) -> tuple[str, ...]:
        """The terms that are outputs of the model and that its own loss adds up."""
        return tuple(self.factors)

    @property
    def is_own(self) -> bool:
        """Whether the loss is the model's own."""
        return self._read_loss is None

    @property
    def loss_place(self) -> int | None:
        """The position of the model's own loss among its outputs in eval mode, if they have no names."""
        return self._own_loss.place_in_eval_mode if self.is_own else None


def scalars_of(loss: Any) -> dict[str, Tensor]:
    """Return what a loss gives, a number or a dict of numbers, as scalars by term.

    Raises:
        SettingsError: if it gives something else.
    """
    means = dict(loss) if isinstance(loss, Mapping) else {LOSS: loss}
    return {term: _scalar(term, mean) for term, mean in means.items()}


def total_of(loss: Any) -> Tensor:
    """Return the sum of the terms that a loss gives."""
    means = list(scalars_of(loss).values())
    return torch.stack(means).sum() if means else torch.zeros(())


def _scalar(term: str, mean: Any) -> Tensor:
    if mean is None:
        raise SettingsError(
            [
                f"The loss {term!r} is None. With a `loss_fn`, the model gets no `labels`, so `outputs.loss` is None. "
                "Compute the loss from `outputs.logits` and `batch['labels']`, or leave `loss_fn` out."
            ]
        )
    if not isinstance(mean, Tensor) or mean.numel() != 1:
        shape = tuple(mean.shape) if isinstance(mean, Tensor) else type(mean).__name__
        raise SettingsError(
            [
                f"`loss_fn` or the model must return one number, or a dict of numbers, but {term!r} is {shape} "
                "instead. Reduce it to a mean, or to a sum with `reduction='sum'`."
            ]
        )
    return mean.reshape(())
