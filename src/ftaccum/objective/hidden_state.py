"""State that a forward pass keeps outside of parameters, buffers and generators, seen by its effect on the next one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..runtime.module_attributes import ModuleAttributes
from ..runtime.state_guards import preserve_buffers, preserve_rng
from .deterministic_forward import DeterministicMode
from .probe import relative

Run = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class HiddenState:
    """What a pass leaves behind that the next one depends on.

    Attributes:
        off: the relative difference in loss between two passes that should be equal; 0 where there is no such state.
        places: where it is; empty where that does not show.
    """

    off: float = 0.0
    places: Sequence[str] = ()


def find_hidden_state(model: nn.Module, modules: Sequence[nn.Module], run: Run, tolerance: float) -> HiddenState:
    """Run the same rows again and again, with generators and buffers put back before each pass.

    In train mode, where passes differ for what they keep in attributes of modules. What is kept elsewhere (a closure,
    a global) shows in eval mode too; in train mode alone it may be a generator of the model's own.

    Args:
        modules: the modules that compute the loss besides the model.
        run: runs a few rows, and returns the loss by term.
        tolerance: the largest difference that is rounding.
    """
    attributes = ModuleAttributes(model, *modules)

    def from_the_start() -> Mapping[str, float]:
        with preserve_rng(), preserve_buffers(model, *modules):
            return run()

    def off(training: bool) -> tuple[float, list[str], float]:
        """Return how far a second pass is from the first, what the first changed, and how far a third is off that
        starts from the same attributes."""
        with DeterministicMode(model, training, {}, modules).passes():
            try:
                first, changed, second = from_the_start(), attributes.changed(), from_the_start()
                if (found := _difference(first, second)) <= tolerance:
                    return 0.0, [], 0.0
                attributes.restore()
                return found, changed, _difference(first, from_the_start())
            finally:
                attributes.restore()

    found, changed, left = off(training=True)
    if not found:
        return HiddenState()
    if changed and left <= tolerance:
        return HiddenState(found, changed)
    return HiddenState() if attributes.hold_generators() else HiddenState(off(training=False)[0])


def _difference(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    return max((relative(other[term], loss) for term, loss in one.items() if loss == loss), default=0.0)
