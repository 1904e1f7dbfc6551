"""The two passes over a window whose loss reads all of its rows together."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.loader import MicroBatch
from ..errors import DataError
from ..objective.batch_changes import fresh_batch
from ..objective.normalizer import LossNormalizer, Means, widened
from ..objective.objective import Objective
from ..objective.window_terms import CollectedValues, ComputedTerms, Values, WindowTerms
from ..runtime.model_context import computes_in_16_bits, is_compiled
from ..runtime.process_group import ProcessGroup
from ..runtime.state_guards import Generators
from ..runtime.wrapped_models import inner_model
from .failures import Failure, failure_of

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
class _FirstPass:
    """The first pass of a micro-batch, as far as the second one needs it.

    Attributes:
        generators: the random state that it started from.
        collected: the values that the window's terms read.
        live: the means and the values with their graph, if there is no second pass; None otherwise.
    """

    generators: Generators
    collected: CollectedValues
    live: tuple[Means, Values] | None = None


class TwoPasses:
    """Runs the micro-batches of one window twice: without gradients, to compute the window's terms, then with them.

    If a window is a single micro-batch on a single process, its first pass has gradients, and there is no second one.
    Call `collect`, then `compute`, then `loss` for each micro-batch in turn.

    Attributes:
        drift: the largest relative difference so far between values of the first and the second pass (a scalar).
        most_drift: the largest drift that counts as rounding.
        forward_passes: the number of forward passes of each micro-batch.
    """

    def __init__(self, model: nn.Module, objective: Objective, terms: WindowTerms, process_group: ProcessGroup) -> None:
        """Args:
        terms: the terms of the objective that read the whole window.
        """
        self._model, self._objective, self._terms, self._process_group = model, objective, terms, process_group
        self._inner = inner_model(model)
        # Graphs compiled without gradients draw other random numbers than with them.
        self._first_has_graphs = is_compiled(self._inner)
        self._device = next(model.parameters()).device
        self._kept: dict[int, _FirstPass] = {}
        self.drift = torch.zeros((), device=self._device)
        self.most_drift = _MOST_DRIFT_IN_16_BITS if computes_in_16_bits(self._inner) else _MOST_DRIFT
        self.forward_passes = 2

    def collect(self, micro_batches: Sequence[MicroBatch]) -> Failure | None:
        """Run the first passes of this process's micro-batches, dummies left out, until one fails.

        Returns:
            Its failure, after which all processes must leave the window; None if all succeed.
        """
        is_only = self._process_group.is_single and len(micro_batches) == 1
        self.forward_passes = 1 if is_only else 2
        for index, micro in enumerate(micro_batches):
            try:
                if not micro.is_dummy:
                    self._kept[index] = self._run_first(micro, is_only=is_only)
            except (DataError, RuntimeError) as error:
                if (failure := failure_of(index, error)) is None:
                    raise
                return failure
        return None

    def _run_first(self, micro: MicroBatch, *, is_only: bool) -> _FirstPass:
        generators, batch = Generators.now(), fresh_batch(micro.batch, self._device)
        with nullcontext() if is_only or self._first_has_graphs else torch.no_grad():
            # Not DDP, which would expect a backward pass.
            means, values, _ = self._objective.observe(self._inner, batch, micro.counts, micro.terms, micro.names)
        live = (means, values) if is_only else None
        return _FirstPass(generators, CollectedValues.of(micro.slice.places, values), live)

    def compute(self, seed: Sequence[int]) -> None:
        """Compute the terms of the window. All processes call this together.

        Args:
            seed: seeds the random numbers that the terms draw; the same on all processes.
        """
        passes = [kept.collected for kept in self._kept.values()]
        with torch.enable_grad():
            self._computed: ComputedTerms = self._terms.compute(passes, self._process_group, seed)
        self._numbers = {index: n for n, index in enumerate(self._kept)}

    def loss(self, index: int, micro: MicroBatch, normalizer: LossNormalizer, *, is_last: bool) -> MicroBatchLoss:
        """Run the second pass of a micro-batch.

        Args:
            is_last: whether this is the last pass of this process, which adds the gradient by the parameters that the
                terms read themselves.
        """
        means, values = self._second(index, micro)
        if micro.is_dummy:
            computed = {term: mean * 0 for term, mean in self._computed.means.items()}
            contribution = backward = self._computed.zero(values)
        else:
            part = self._computed.part(self._numbers[index], values)
            computed, contribution, backward = dict(self._computed.means), part.loss, part.surrogate
        if means:
            others = normalizer.contribution(means, micro.counts)
            contribution, backward = contribution + others, backward + others
        if is_last and (of_parameters := self._computed.of_parameters()) is not None:
            # Each process has the whole of it, and the gradients of all processes are added up.
            backward = backward + of_parameters / self._process_group.size
        return MicroBatchLoss({**means, **computed}, contribution, backward)

    def _second(self, index: int, micro: MicroBatch) -> tuple[Means, Values]:
        kept = self._kept.get(index)
        if kept is not None and kept.live is not None:
            live, kept.live = kept.live, None
            return live
        if kept is not None:
            kept.generators.restore()
        batch = fresh_batch(micro.batch, self._device)
        means, values, _ = self._objective.observe(self._model, batch, micro.counts, micro.terms, micro.names)
        if kept is not None:
            difference = _difference(self._terms.compared(kept.collected.values), values)
            self.drift = torch.maximum(self.drift, difference.to(self._device))
        return means, values


def _difference(first: Values, second: Mapping[str, Tensor]) -> Tensor:
    """Return the largest difference between values of two passes, relative to the largest number of each."""
    found = []
    for name, one in first.items():
        if one.numel():
            largest = widened(one).abs().max()
            found.append((widened(one) - widened(second[name].detach())).abs().max() / largest.clamp_min(1e-30))
    return torch.stack(found).max().float() if found else torch.zeros(())
