"""A comparison of the gradient of a few rows in one batch with that accumulated over separate batches."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import SettingsError
from ..runtime.graph_leaves import leaves_of
from ..runtime.memory import give_back_memory, is_out_of_memory, none_if_out_of_memory
from ..runtime.module_attributes import preserve_attributes
from ..runtime.state_guards import preserve_buffers
from .gradient_sketch import GradientSketch, sketch_gradients
from .item_counts import Batch, CountItems
from .normalizer import Means, weighted_sum
from .perturbation import float64_weights

T = TypeVar("T")

# A parameter's gradient differs if its error exceeds three bounds: the tolerance times its own norm, a hundredth of the
# tolerance times the norm of the whole gradient, and ten times the change from another order of the rows.
_OF_ALL, _OF_ROUNDING = 1e-2, 10


@dataclass(frozen=True)
class GradientDifference:
    """The difference between the gradient accumulated over separate batches and that of one batch.

    Attributes:
        off: the norm of the difference, relative to that of the gradient; 0 if the difference is rounding.
        tensors: the names of the parameters that differ, the largest difference first.
    """

    off: float = 0.0
    tensors: Sequence[str] = ()


@dataclass(frozen=True)
class JointGradient:
    """The gradient of a few rows in one batch, and their losses by term."""

    sketch: GradientSketch
    losses: dict[str, float]


@dataclass(frozen=True)
class GradientCheck:
    """A comparison of gradients of rows in one batch and in separate batches, as sketches.

    Attributes:
        run: maps a batch to the means of its loss by term, with their graph. It must return the same each time.
        counts: how to count each term that has items.
        modules: the modules that compute the loss, besides the model.
        run_separate: the same as `run` for separate batches; None if they run in the same way.
    """

    model: nn.Module
    run: Callable[[Batch], Means]
    counts: Mapping[str, CountItems]
    modules: Sequence[nn.Module] = ()
    run_separate: Callable[[Batch], Means] | None = None

    def gradient(self, batches: Sequence[Batch], *, needs_gradient: bool = False) -> GradientSketch:
        """Return the sketch of the gradient accumulated over batches.

        Args:
            needs_gradient: whether the loss of every batch with loss items must have a gradient.

        Raises:
            SettingsError: if such a loss has no gradient, or the backward pass fails.
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
                        backward(loss)
                    elif needs_gradient and any(counted.values()):
                        raise SettingsError([_NO_GRADIENT])
        return sketch

    def together(self, batch: Batch) -> GradientSketch:
        """Return the sketch of the gradient of one batch.

        Raises:
            SettingsError: if it has none, or the backward pass fails.
        """
        return self.gradient([batch], needs_gradient=True)

    def with_losses(self, batch: Batch) -> JointGradient:
        """Return the same as `together`, and the losses of the same pass. It may leave out terms.

        Raises:
            SettingsError: as `together` does.
        """
        losses: dict[str, float] = {}

        def run(batch: Batch) -> Means:
            means = self.run(batch)
            losses.update({term: mean.item() for term, mean in means.items()})
            return means

        return JointGradient(replace(self, run=run).together(batch), losses)

    def difference(
        self,
        sketch: GradientSketch,
        together: Batch,
        separate: Sequence[Batch],
        reordered: Batch | None,
        tolerance: float,
    ) -> GradientDifference:
        """Return how far the gradient accumulated over separate batches is from that of one batch.

        Args:
            sketch: the sketch of the gradient of one batch.
            together: that batch.
            separate: the same rows in separate batches.
            reordered: the rows in another order, to measure rounding with; None if their order is fixed.
            tolerance: the largest relative difference that counts as rounding.
        """
        apart = self if self.run_separate is None else replace(self, run=self.run_separate)

        def compare(sketch: GradientSketch, convert: Callable[[Batch], Batch]) -> GradientDifference:
            again = None if reordered is None else lambda: self.gradient([convert(reordered)])
            return difference_of(sketch, apart.gradient([convert(part) for part in separate]), again, tolerance)

        found = compare(sketch, lambda batch: batch)
        in_float64 = lambda convert: compare(self.together(convert(together)), convert)
        return confirm_in_float64(found, in_float64, self.model, *self.modules)


def difference_of(
    together: GradientSketch, separate: GradientSketch, reordered: Callable[[], GradientSketch] | None, tolerance: float
) -> GradientDifference:
    """Return how far a gradient is from that of one batch.

    Args:
        together: the sketch of the gradient of one batch.
        separate: that of the same rows in separate batches.
        reordered: returns that of one batch in another order, to measure rounding with; None if the order is fixed.
        tolerance: the largest relative difference that counts as rounding.
    """
    size, sizes = together.norm(), together.norms()
    off = together.minus(separate).norms()
    if not math.isfinite(size) or not size:
        return GradientDifference()

    def beyond(name: str) -> bool:
        return off[name] > tolerance * max(sizes.get(name, 0.0), _OF_ALL * size)

    suspects = [name for name in off if beyond(name)]
    if suspects and reordered is not None:
        rounding = together.minus(reordered()).norms()
        suspects = [name for name in suspects if off[name] > _OF_ROUNDING * rounding.get(name, 0.0)]
    if not suspects:
        return GradientDifference()
    return GradientDifference(math.hypot(*off.values()) / size, sorted(suspects, key=lambda name: -off[name]))


def confirm_in_float64(
    found: GradientDifference,
    compare: Callable[[Callable[[Batch], Batch]], GradientDifference],
    *modules: nn.Module,
) -> GradientDifference:
    """Return the difference between two gradients as it is in float64, if float32 shows one.

    Where the gradients of rows nearly cancel out, rounding may exceed the tolerance although another order of the rows
    does not show it. For new adapters of attention weights, the error was 8 times the tolerance and 5,000 times the
    change from another order, but 5e-13 of the gradient in float64.

    Args:
        found: the difference in float32.
        compare: compares the two gradients again, given a function that converts a batch to float64.
        modules: the modules that compute the loss.

    Returns:
        The difference in float64; `found` if the modules cannot run in float64.
    """
    if not found.off:
        return found
    try:
        with float64_weights(*modules) as convert:
            return compare(convert)
    except Exception as error:  # a module may need its own type
        if is_out_of_memory(error):
            give_back_memory()
        return found


def if_memory_allows(run: Callable[[], T]) -> T | None:
    """Return the result of passes with gradients; None if memory runs out."""
    found = none_if_out_of_memory(run)
    if found is None:
        give_back_memory()  # a few long rows may need more than a micro-batch
    return found


def backward(loss: Tensor) -> None:
    """Run the backward pass, and restore the gradients of all weights, also of those outside the model."""
    before = [(leaf, leaf.grad) for leaf in leaves_of(loss)]
    for leaf, _ in before:  # a backward pass adds to `grad` in place
        leaf.grad = None
    try:
        loss.backward()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise SettingsError(
            [
                f"The backward pass of the loss fails: {error} If a tensor is changed in place (`+=`, `x[...] =`, "
                "a function that ends in `_`), make a new one instead."
            ]
        ) from error
    finally:
        for leaf, gradient in before:
            leaf.grad = gradient


_NO_GRADIENT = (
    "The loss does not depend on any trainable parameter, so there is no gradient. Look for `detach()`, `item()`, "
    "`no_grad`, `argmax` or NumPy between the model's outputs and the loss, and for frozen parameters."
)
