"""The check before training that two passes over a window give the gradient that plain PyTorch gives for one batch."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import SettingsError
from ..runtime.graph_leaves import leaves_besides
from ..runtime.module_attributes import preserve_attributes
from ..runtime.process_group import ProcessGroup
from ..runtime.state_guards import Generators, preserve_buffers, preserve_rng, seed_all
from .forward import total_of
from .gradient_check import GradientDifference, backward, confirm_in_float64, difference_of, if_memory_allows
from .gradient_sketch import GradientSketch, sketch_gradients
from .item_counts import Batch, rows_of
from .row_terms import RowTerms
from .sample import REVERSED, Sample
from .window_forward import WindowForward
from .window_terms import CollectedValues

_SEED = (0,)  # of what the loss draws
_NOISE = 1e-5  # norm of a gradient that is rounding, relative to that of the gradient by the inputs of the loss


@dataclass(frozen=True)
class WindowGradientCheck:
    """A comparison of the gradient of two passes over a few rows with that of one batch.

    Attributes:
        model: the model, in the mode to check it in. Its passes must be the same each time.
        prepared: returns a batch as the model takes it, on its device.
    """

    model: nn.Module
    forward: WindowForward
    terms: RowTerms
    sample: Sample
    prepared: Callable[[Batch], Batch]

    def refuse_unknown_parameters(self) -> None:
        """Raise SettingsError if the loss depends on a parameter that belongs to neither the model nor `loss_fn`."""
        loss_fn = self.forward.window_loss.loss_fn
        modules = [self.model, *([loss_fn] if isinstance(loss_fn, nn.Module) else [])]
        known = [p for module in modules for p in module.parameters()]

        def unknown() -> list[Tensor]:
            with torch.enable_grad(), preserve_attributes(self._both), preserve_buffers(self._both):
                return leaves_besides(self._loss(self.sample.together), known)

        found = unknown()
        again = {id(leaf) for leaf in unknown()} if found else set()
        lasting = [leaf for leaf in found if id(leaf) in again]  # not what a pass creates, to differentiate by it
        if lasting:
            raise SettingsError(
                [
                    f"The loss depends on a tensor of shape {tuple(lasting[0].shape)} that requires a gradient, but "
                    "belongs to neither the model nor `loss_fn`. With `loss_over='window'`, it would not be trained. "
                    "Make it a parameter of one of them (`loss_fn` may be an nn.Module, `loss_inputs` must have none "
                    "of its own), or set its `requires_grad` to False."
                ]
            )

    def difference(self, tolerance: float) -> GradientDifference:
        """Return how far the gradient of two passes is from that of one batch, if memory allows to measure it.

        Args:
            tolerance: the largest relative difference that counts as rounding.
        """

        def run() -> GradientDifference:
            if self._draws():  # also in eval mode, so that no two passes are the same
                return GradientDifference()
            found = self._difference(tolerance)
            return confirm_in_float64(
                found, lambda convert: self._converted(convert)._difference(tolerance), self._both
            )

        return if_memory_allows(run) or GradientDifference()

    def _difference(self, tolerance: float) -> GradientDifference:
        reordered = self.sample.reordered
        together = self._of_one_batch(self.sample.together)
        separate, by_inputs = self._of_two_passes()
        if together.norm() < _NOISE * by_inputs:
            return GradientDifference()  # the gradient is rounding, as that of the norm of normalized embeddings
        again = None if reordered is None else lambda: self._of_one_batch(reordered, REVERSED)
        return difference_of(together, separate, again, tolerance)

    def _converted(self, convert: Callable[[Batch], Batch]) -> "WindowGradientCheck":
        return replace(self, prepared=lambda batch: convert(self.prepared(batch)))

    def _draws(self) -> bool:
        with preserve_rng(), torch.no_grad(), preserve_attributes(self._both), preserve_buffers(self._both):
            before = Generators.now()
            self.forward.outputs(self.model, self.prepared(self.sample.together))
            return not before.unchanged()

    @property
    def _both(self) -> nn.Module:
        return nn.ModuleDict({"model": self.model, "loss": self.forward.window_loss})

    def _loss(self, batch: Batch, places: Sequence[int] = ()) -> Tensor:
        given = self.prepared(batch)
        outputs = self.forward.outputs(self.model, given)
        with preserve_rng():
            seed_all(*_SEED)
            return total_of(self.forward.window_loss(outputs, given, places))

    @contextmanager
    def _measuring(self) -> Iterator[GradientSketch]:
        """Yield the sketch of the gradients of backward passes, and restore all state on exit."""
        both = self._both
        with (
            torch.enable_grad(), sketch_gradients(both) as sketch,
            preserve_rng(), preserve_attributes(both), preserve_buffers(both),
        ):  # fmt: skip
            yield sketch

    def _of_one_batch(self, batch: Batch, places: Sequence[int] = ()) -> GradientSketch:
        with self._measuring() as sketch:
            loss = self._loss(batch, places)
            if loss.requires_grad:
                backward(loss)
        return _named(sketch)

    def _of_two_passes(self) -> tuple[GradientSketch, float]:
        """Return the gradient, and the norm of that by the inputs of the loss."""
        both, passes, n_before = self._both, [], 0
        parts = self.sample.separate(self.sample.together)
        with self._measuring() as sketch:
            for part in parts:
                places = range(n_before, n_before + rows_of(part))
                with torch.no_grad(), preserve_buffers(both):
                    given = self.prepared(part)
                    values = self.terms.read(self.forward.outputs(self.model, given), given)
                passes.append(CollectedValues.of(places, values))
                n_before += len(places)
            computed = self.terms.compute(passes, ProcessGroup(1), _SEED)
            for n, part in enumerate(parts):
                with preserve_buffers(both):
                    given = self.prepared(part)
                    values = self.terms.read(self.forward.outputs(self.model, given), given)
                    surrogate = computed.part(n, values).surrogate
                    if n == 0 and (of_parameters := computed.of_parameters()) is not None:
                        surrogate = surrogate + of_parameters
                    if surrogate.requires_grad:
                        backward(surrogate)
        by_inputs = [gradient.double().norm().item() for parts in computed.by_pass.values() for gradient in parts]
        return _named(sketch), math.hypot(*by_inputs)


def _named(sketch: GradientSketch) -> GradientSketch:
    """Return a sketch with the names of the model's and the loss's own parameters."""
    shorter = (name.removeprefix("model.").removeprefix("loss.") for name in sketch.sums)
    return GradientSketch(dict(zip(shorter, sketch.sums.values(), strict=True)))
