"""Compares the gradient of a few rows together with the weighted gradients of the same rows apart."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import SettingsError
from ..runtime.memory import is_out_of_memory
from ..runtime.module_attributes import preserve_attributes
from ..runtime.state_guards import preserve_buffers
from .gradient_sketch import GradientSketch, sketch_gradients
from .item_counts import Batch, CountItems
from .normalizer import Means, weighted_sum

# A tensor differs where its gradient is off by more than the tolerance relative to itself, by more than a hundredth of
# the tolerance relative to the whole gradient, and by ten times what another order of the rows changes.
_OF_ALL, _OF_ROUNDING = 1e-2, 10


@dataclass(frozen=True)
class GradientDifference:
    """How far the gradient of rows apart is from that of all together.

    Attributes:
        off: the norm of the difference, relative to that of the gradient; 0 where it is rounding.
        tensors: the parameters that differ most, in order.
    """

    off: float = 0.0
    tensors: Sequence[str] = ()


@dataclass(frozen=True)
class GradientCheck:
    """Gradients of rows together and apart, as sketches.

    Attributes:
        run: a batch → the means of its loss by term, with their graph; the same each time.
        counts: how each term is counted that has items.
        modules: those that compute the loss besides the model.
    """

    model: nn.Module
    run: Callable[[Batch], Means]
    counts: Mapping[str, CountItems]
    modules: Sequence[nn.Module] = ()

    def gradient(self, batches: Sequence[Batch], *, needs_gradient: bool = False) -> GradientSketch:
        """Return the sketch of the gradient accumulated over batches.

        Args:
            needs_gradient: whether each of them that has loss items must have one.

        Raises:
            SettingsError: where the loss has no gradient, or the backward pass fails.
        """
        counts = [{term: count(batch) for term, count in self.counts.items()} for batch in batches]
        items = {term: sum(each[term] for each in counts) for term in self.counts}
        with torch.enable_grad(), sketch_gradients(self.model) as sketch:
            for batch, counted in zip(batches, counts, strict=True):
                with (
                    preserve_buffers(self.model, *self.modules),
                    preserve_attributes(self.model, *self.modules),
                ):  # until after the backward pass, which may need them
                    means = {term: mean for term, mean in self.run(batch).items() if counted.get(term)}
                    loss = weighted_sum(means, counted, items) if means else torch.zeros(())
                    if loss.requires_grad:
                        _backward(loss)
                    elif needs_gradient and any(counted.values()):
                        raise SettingsError([_NO_GRADIENT])
        return sketch

    def together(self, batch: Batch) -> GradientSketch:
        """Return the sketch of the gradient of one batch.

        Raises:
            SettingsError: where there is none.
        """
        return self.gradient([batch], needs_gradient=True)

    def difference(
        self, together: GradientSketch, apart: Sequence[Batch], reordered: Batch | None, tolerance: float
    ) -> GradientDifference:
        """Return how far the gradient accumulated over parts is from that of all rows.

        Args:
            reordered: the rows in another order, to measure rounding with; None where they have to stay in order.
        """
        size, sizes = together.norm(), together.norms()
        off = together.minus(self.gradient(apart)).norms()
        if not math.isfinite(size) or not size:
            return GradientDifference()

        def beyond(name: str) -> bool:
            return off[name] > tolerance * max(sizes.get(name, 0.0), _OF_ALL * size)

        suspects = [name for name in off if beyond(name)]
        if suspects and reordered is not None:
            rounding = together.minus(self.gradient([reordered])).norms()
            suspects = [name for name in suspects if off[name] > _OF_ROUNDING * rounding.get(name, 0.0)]
        if not suspects:
            return GradientDifference()
        return GradientDifference(math.hypot(*off.values()) / size, sorted(suspects, key=lambda name: -off[name]))


def _backward(loss: Tensor) -> None:
    """Run the backward pass, and leave the gradients of weights outside of the model as they were."""
    before = [(leaf, leaf.grad) for leaf in _leaves(loss)]
    try:
        loss.backward()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise SettingsError(
            [
                f"The backward pass of the loss fails: {error} Where a tensor was changed in place (`+=`, `x[...] =`, "
                "a function that ends in `_`), make a new one instead."
            ]
        ) from error
    finally:
        for leaf, gradient in before:
            leaf.grad = gradient


def _leaves(loss: Tensor) -> list[Tensor]:
    """Return the tensors that the backward pass accumulates gradients in."""
    found, seen, ahead = [], set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [node.variable] if hasattr(node, "variable") else []
        ahead += [following for following, _ in node.next_functions]
    return found


_NO_GRADIENT = (
    "The loss does not depend on any trainable parameter, so that there is no gradient. Look for `detach()`, `item()`, "
    "`no_grad`, `argmax` or NumPy between the model's outputs and the loss, and for parameters that are frozen."
)
