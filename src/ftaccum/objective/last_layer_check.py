"""Find out before training whether the last layer can be computed only at the positions that are read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import first_line
from ..runtime.memory import is_out_of_memory
from ..runtime.model_context import is_compiled
from ..runtime.process_group import of_main_process
from ..runtime.state_guards import inspection_mode, training_mode
from ..runtime.temporary_attribute import temporary_attribute
from .batch_changes import fresh_batch_for
from .deterministic_forward import DeterministicMode
from .gradient_check import GradientCheck, GradientDifference, JointGradient, confirm_in_float64, difference_of
from .item_counts import Batch, are_per_token, targets_of
from .last_layer import LastLayer, can_be_lazy
from .objective import Objective
from .perturbation import float32_weights, perturb_head
from .probe import relative
from .sample import Sample

_LEAST_SHARE = 0.1  # of the layer's weights, below which a lazy layer does not pay
_GRADIENT = 10  # the tolerance of the gradient, in multiples of that of the loss


def find_last_layer(model: nn.Module, sample: Sample, objective: Objective) -> LastLayer | str:
    """Return the last layer if computing it at the positions that are read gives the same loss and gradient, for less.

    Compare both on the sample, in train mode without dropout. All processes use the main process's finding.

    Returns:
        The layer, or the reason why it is computed at all positions, for a message.
    """
    if next(model.parameters()).device.type != "cpu":
        return "the model is not on a CPU"
    if is_compiled(model):
        return "the model is compiled"
    if are_per_token(targets_of(sample.together)):
        return "each token has a label"
    if not (layers := _layers(model)):
        return "the model has no list of layers"
    comparison = _Comparison(model, sample, objective)
    with inspection_mode(model, *objective.modules):
        found, place = of_main_process(comparison.finding(layers))
    return LastLayer(model, layers[place]) if found is None else found


class _Comparison:
    """A comparison of a loss and its gradient with and without a lazy last layer."""

    def __init__(self, model: nn.Module, sample: Sample, objective: Objective) -> None:
        self._model, self._sample, self._objective = model, sample, objective
        self._mode = DeterministicMode(model, True, {}, objective.modules)

    def finding(self, layers: list[nn.Module]) -> tuple[str | None, int]:
        """Return why the last layer is computed at all positions, or None, and its place among the layers."""
        with float32_weights(self._model, *self._objective.modules) as prepared, perturb_head(self._model):
            try:
                return self._compared(prepared(self._sample.together), layers)
            except Exception as error:  # a model may use its hidden states in ways that lazy ones do not support
                if is_out_of_memory(error):
                    return "memory ran out during the comparison", 0
                return f"the model fails with a lazy last layer: {first_line(error)}", 0

    def _compared(self, batch: Batch, layers: Sequence[nn.Module]) -> tuple[str | None, int]:
        with _called(layers) as called:
            own = self._losses_and_gradient(batch)
        if not called:
            return "no layer takes hidden states", 0
        place = called[-1]
        last_layer = LastLayer(self._model, layers[place])
        if (reason := last_layer.reason()) is not None:
            return reason, place
        with last_layer.lazily() as frames:
            found = self._losses_and_gradient(batch)
        n_weights = sum(weight.numel() for weight in layers[place].parameters())
        if sum(frame.saved_weights for frame in frames) < _LEAST_SHARE * n_weights * len(frames):
            return "all of its positions are read", place
        # With dropout, which must not draw twice for one position, and draws when a position is read.
        with torch.enable_grad(), training_mode(self._model, training=True), _seeding() as seeded, last_layer.lazily():
            self._means(batch)
        if seeded:
            return "the model sets the state of random numbers", place
        return self._difference(batch, last_layer, own, found), place

    def _difference(self, batch: Batch, last_layer: LastLayer, own: JointGradient, found: JointGradient) -> str | None:
        tolerance = self._objective.report.tolerance
        terms = {*own.losses, *found.losses}
        off = max(relative(found.losses.get(term, 0.0), own.losses.get(term, 0.0)) for term in terms)
        if off > tolerance:
            return f"the loss differs by {off:.1e}"

        def compare(own: JointGradient, found: JointGradient) -> GradientDifference:
            return difference_of(own.sketch, found.sketch, None, _GRADIENT * tolerance)

        def in_float64(convert: Callable[[Batch], Batch]) -> GradientDifference:
            own = self._losses_and_gradient(convert(batch))
            with last_layer.lazily():
                return compare(own, self._losses_and_gradient(convert(batch)))

        difference = confirm_in_float64(compare(own, found), in_float64, self._model, *self._objective.modules)
        return f"the gradient differs by {difference.off:.1e}" if difference.off else None

    def _losses_and_gradient(self, batch: Batch) -> JointGradient:
        check = GradientCheck(self._model, self._means, self._objective.count_by_term, self._objective.modules)
        with self._mode.passes():
            return check.with_losses(batch)

    def _means(self, batch: Batch) -> dict[str, Tensor]:
        given = fresh_batch_for(self._model, batch)
        return self._objective.forward(self._model, given, self._objective.count(batch))[0]


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the elements of all lists of modules that are in no other list, in the order of the model."""
    found: list[nn.Module] = []
    inner: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inner:
            found += module
            inner |= {part for layer in module for part in layer.modules()}
    return found


@contextmanager
def _seeding() -> Iterator[list[str]]:
    """Note the calls of functions that set the state of torch's random numbers."""
    called: list[str] = []

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            called.append(function.__name__)
            return function(*args, **kwargs)

        return run

    with ExitStack() as stack:
        for name in ("manual_seed", "seed", "set_rng_state"):
            for owner in (torch, torch.random):  # `fork_rng` uses the latter's
                stack.enter_context(temporary_attribute(owner, name, noting(getattr(owner, name))))
        yield called


@contextmanager
def _called(layers: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Note the places of layers that are called with hidden states, in the order of the calls."""
    called: list[int] = []

    def note(place: int, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and can_be_lazy(inputs[0]):
            called.append(place)

    handles = [layer.register_forward_pre_hook(partial(note, place)) for place, layer in enumerate(layers)]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
