"""State that a forward pass keeps outside parameters, buffers and generators, detected by its effect on the next."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..runtime.module_attributes import ModuleAttributes
from ..runtime.state_guards import preserve_buffers, preserve_rng
from .deterministic_forward import DeterministicMode, difference_of_passes

Run = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class HiddenState:
    """State that one forward pass leaves behind and the next one depends on.

    Attributes:
        off: the relative difference in loss between two passes that should be equal; 0 if there is no such state.
        places: where the state is; empty if unknown.
        in_weights: whether it is in weights, and `off` is the relative difference of these.
    """

    off: float = 0.0
    places: Sequence[str] = ()
    in_weights: bool = False


def find_hidden_state(model: nn.Module, modules: Sequence[nn.Module], run: Run, tolerance: float) -> HiddenState:
    """Run the same rows several times, with generators and buffers restored each time, and compare the losses.

    If passes in train mode differ, and restoring the attributes of modules makes them equal, the state is in these
    attributes. Otherwise it is elsewhere (a closure, a global), and counts only if passes differ in eval mode too. It
    does not count if the model holds random generators of its own, which may cause the difference.

    Args:
        modules: the modules that compute the loss, besides the model.
        run: runs a few rows, and returns the loss by term.
        tolerance: the largest difference that counts as rounding.
    """
    attributes = ModuleAttributes(model, *modules)

    def from_the_start() -> Mapping[str, float]:
        with preserve_rng(), preserve_buffers(model, *modules):
            return run()

    def off(training: bool) -> tuple[float, list[str], float]:
        """Return how far a second pass is from the first, the attributes that the first changed, and how far a third
        pass is from the first after they are restored."""
        with DeterministicMode(model, training, {}, modules).passes():
            try:
                first, changed, second = from_the_start(), attributes.changed(), from_the_start()
                if (found := difference_of_passes(first, second)) <= tolerance:
                    return 0.0, [], 0.0
                attributes.restore()
                return found, changed, difference_of_passes(first, from_the_start())
            finally:
                attributes.restore()

    found, changed, left = off(training=True)
    if not found:
        return HiddenState()
    if changed and left <= tolerance:
        return HiddenState(found, changed)
    return HiddenState() if attributes.hold_generators() else HiddenState(off(training=False)[0])
