"""The two passes over a window whose loss reads all of its rows together."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.loader import MicroBatch
from ..objective.batch_changes import fresh_batch
from ..objective.normalizer import LossNormalizer, Means, widened
from ..objective.objective import Objective
from ..objective.window_terms import FirstPass, SettledTerms, Values, WindowTerms
from ..runtime.model_context import computes_in_16_bits, is_compiled
from ..runtime.process_group import ProcessGroup
from ..runtime.state_guards import Generators

_MOST_DRIFT, _MOST_DRIFT_IN_16_BITS = 1e-5, 1e-2


@dataclass(frozen=True)
class MicroBatchLoss:
    """The loss of a micro-batch.

    Attributes:
        means: the mean of each term.
        contribution: its part of the window's loss (a scalar).
        backward: the scalar to backpropagate: its gradient is that of the contribution, but its value may differ.
    """

    means: Means
    contribution: Tensor
    backward: Tensor


@dataclass
class _Kept:
    """What the first pass keeps of a micro-batch.

    Attributes:
        generators: the random state that it started from.
        found: what the window's terms read.
        live: the means and the values with their graph, if there is no second pass; None otherwise.
    """

    generators: Generators
    found: FirstPass
    live: tuple[Means, Values] | None = None


@dataclass
class TwoPasses:
    """Runs the micro-batches of a window twice: first without gradients, to settle the window's terms, then with them.

    If a window is a single micro-batch on a single process, its first pass has gradients, and there is no second one.

    Attributes:
        drift: the largest relative difference so far between values of the first and the second pass (a scalar).
        forward_passes: the number of forward passes of each micro-batch.
    """

    model: nn.Module
    objective: Objective
    terms: WindowTerms
    process_group: ProcessGroup
    device: torch.device
    drift: Tensor = field(init=False)
    forward_passes: int = 2
    _kept: dict[int, _Kept] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Graphs compiled without gradients draw other random numbers than with them.
        self._first_has_graphs = is_compiled(self._inner)
        self.drift = torch.zeros((), device=self.device)

    @property
    def most_drift(self) -> float:
        """The largest drift that counts as rounding."""
        return _MOST_DRIFT_IN_16_BITS if computes_in_16_bits(self._inner) else _MOST_DRIFT

    def run_first(self, index: int, micro: MicroBatch, *, is_only: bool) -> None:
        """Run the first pass of a micro-batch, unless it is a dummy.

        Args:
            index: the position of the micro-batch in this process's part of the window.
            is_only: whether the window has no other micro-batch, on any process.
        """
        if micro.is_dummy:
            return
        generators, batch = Generators.now(), fresh_batch(micro.batch, self.device)
        with nullcontext() if is_only or self._first_has_graphs else torch.no_grad():
            # Not DDP, which would expect a backward pass.
            means, values, _ = self.objective.observe(self._inner, batch, micro.counts, micro.terms, micro.names)
        self._kept[index] = _Kept(generators, FirstPass.of(micro.slice.places, values))
        if is_only:
            self._kept[index].live, self.forward_passes = (means, values), 1

    def settle(self) -> None:
        """Compute the terms of the window. All processes call this after their first passes."""
        passes = [kept.found for kept in self._kept.values()]
        with torch.enable_grad():
            self._settled: SettledTerms = self.terms.settle(passes, self.process_group)
        self._numbers = {index: n for n, index in enumerate(self._kept)}

    def loss(self, index: int, micro: MicroBatch, normalizer: LossNormalizer, *, is_last: bool) -> MicroBatchLoss:
        """Run the second pass of a micro-batch.

        Args:
            is_last: whether this is the last pass of this process, which adds the gradient by the parameters that the
                terms read themselves.
        """
        means, values = self._second(index, micro)
        if micro.is_dummy:
            settled, contribution = {term: mean * 0 for term, mean in self._settled.means.items()}, _zero(values)
            backward = contribution
        else:
            part = self._settled.part(self._numbers[index], values)
            settled, contribution, backward = dict(self._settled.means), part.loss, part.surrogate
        if means:
            others = normalizer.contribution(means, micro.counts)
            contribution, backward = contribution + others, backward + others
        if is_last and (of_parameters := self._settled.of_parameters()) is not None:
            # Each process has the whole of it, and the gradients of all processes are added up.
            backward = backward + of_parameters / self.process_group.size
        return MicroBatchLoss({**means, **settled}, contribution, backward)

    @property
    def _inner(self) -> nn.Module:
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def _second(self, index: int, micro: MicroBatch) -> tuple[Means, Values]:
        kept = self._kept.get(index)
        if kept is not None and kept.live is not None:
            live, kept.live = kept.live, None
            return live
        if kept is not None:
            kept.generators.restore()
        batch = fresh_batch(micro.batch, self.device)
        means, values, _ = self.objective.observe(self.model, batch, micro.counts, micro.terms, micro.names)
        if kept is not None:
            self.drift = torch.maximum(self.drift, _difference(kept.found.values, values))
        return means, values


def _zero(values: Values) -> Tensor:
    """Return 0, with a gradient of zeros by all values that have one."""
    parts = [widened(value).sum() * 0 for value in values.values() if value.requires_grad]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def _difference(first: Values, second: Mapping[str, Tensor]) -> Tensor:
    """Return the largest difference of floating-point values between two passes, relative to the largest number."""
    found = []
    for name, one in first.items():
        if one.is_floating_point() and one.numel():
            largest = widened(one).abs().max()
            found.append((widened(one) - widened(second[name].detach())).abs().max() / largest.clamp_min(1e-30))
    return torch.stack(found).max().float() if found else torch.zeros(())
