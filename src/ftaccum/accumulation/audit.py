"""Audits, which check the gradient of a real window during training.

Before training, the self-check measures the loss on a few rows. An audit checks the rows of an update: it accumulates
their gradient as training does, and compares it with the gradient of one unweighted batch of the same rows. If one
batch does not fit in memory, the reference is another split of the window, and the audit misses faults that both splits
share. Both gradients are computed without dropout, and only their sketches are kept.
"""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..objective.deterministic_forward import DeterministicMode
from ..objective.gradient_sketch import GradientSketch
from ..objective.hidden_state import find_hidden_state
from ..objective.normalizer import gathered
from ..objective.objective import Objective
from ..objective.probe import relative
from ..runtime.accumulation_backend import AccumulationBackend
from ..runtime.gradients.plain import GradientStrategy
from ..runtime.memory import WindowOutOfMemoryError, give_back_memory, is_out_of_memory
from ..runtime.model_context import run_eagerly
from ..runtime.module_attributes import preserve_attributes
from ..runtime.process_group import ProcessGroup
from ..runtime.sharding.tensors import whole_tensor
from ..runtime.state_guards import Generators
from ..runtime.written_weights import preserve_weights
from .accumulator import GradientAccumulator
from .audit_sample import AuditSample
from .one_batch import OneBatch

_THIRD = 1 / 3  # a factor that makes every number round differently
ONE_BATCH, ANOTHER_CUT = "one batch", "another cut"


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        n_rows: the number of rows audited, on all processes.
        reference: "one batch" or "another cut" (another split into micro-batches).
        error: ‖accumulated gradient − reference‖ / ‖reference‖.
        parameters: the share of each parameter in the squared norm of the difference, largest first.
        loss_error: the relative difference of the losses.
        rounding: the relative error of a gradient recomputed with its rows in reverse order; None if not measured.
        keeps_state: whether a forward pass changes the result of the next one through state outside of buffers.
        selects_positions: whether accumulation computes logits at labelled positions only.
    """

    n_rows: int
    reference: str
    error: float
    parameters: Mapping[str, float]
    loss_error: float
    rounding: float | None = None
    keeps_state: bool = False
    selects_positions: bool = False


class GradientAuditor:
    """Audits windows. All processes must make the same calls. Weights, buffers and generators stay unchanged."""

    def __init__(
        self,
        accelerator: AccumulationBackend,
        model: nn.Module,
        objective: Objective,
        strategy: GradientStrategy,
        process_group: ProcessGroup,
        accumulator: GradientAccumulator,
    ) -> None:
        """Create an auditor.

        Args:
            model: the model, not wrapped for several processes.
            accumulator: a separate accumulator, which training does not use.
        """
        self._accelerator, self._model, self._objective = accelerator, model, objective
        self._strategy, self._process_group = strategy, process_group
        self._accumulator = accumulator
        self._one_batch = OneBatch(accelerator, model, objective, strategy, process_group)
        self._mode: DeterministicMode | None = None
        self._keeps_state, self._repeats = False, True

    @property
    def is_possible(self) -> bool:
        """Whether windows can be audited: the model runs single rows, and its passes are repeatable (it may draw random
        numbers even in eval mode)."""
        takes_single_rows = self._objective.report.in_training.complaint is None
        return takes_single_rows and (self._repeats or self._keeps_state)

    def audit(self, sample: AuditSample, *, tolerance: float | None) -> Audit | None:
        """Audit rows of a window before its gradient is accumulated for training.

        Args:
            tolerance: measure rounding only if the error exceeds this value; None to measure it always.

        Returns:
            None if memory ran out, gradients are not finite, no row has loss items, passes are not repeatable or there
            is nothing to compare with.
        """
        with ExitStack() as stack:
            stack.callback(self._accumulator.zero_gradients)
            stack.enter_context(run_eagerly(self._model))
            stack.enter_context(preserve_attributes(self._model, *self._objective.modules))
            stack.enter_context(preserve_weights(self._model, *self._objective.modules))
            if (mode := self._deterministic_mode(sample)) is None or not self.is_possible:
                return None
            stack.enter_context(mode.passes())
            if (accumulated := self._accumulate(sample)) is None:
                return None
            reference, compared, wanted = self._reference(sample)
            audit = self._process_group.run_on_main(lambda: _compared(sample.n_rows, reference, accumulated, wanted))
            if audit is None:
                return None
            rounding = None
            if tolerance is None or audit.error > tolerance:
                of_one = (compared, wanted) if reference == ONE_BATCH else None
                rounding = self._rounding(sample, accumulated, of_one)
        selects = self._objective.labelled_head is not None
        return replace(audit, rounding=rounding, keeps_state=self._keeps_state, selects_positions=selects)

    def _deterministic_mode(self, sample: AuditSample) -> DeterministicMode | None:
        """Return the mode that runs the model without dropout, found in the first audit; None if memory runs out."""
        if self._mode is None:
            found = self._one_batch.run_on_main(lambda: self._find_mode(sample))
            if found is None:
                return None
            whole, moving, self._keeps_state, self._repeats = found
            mode = DeterministicMode(self._model, whole, {}, self._objective.modules)
            modules = mode.named_modules()
            self._mode = replace(mode, moving={name: modules[name] for name in moving})
        return self._mode

    def _find_mode(self, sample: AuditSample) -> tuple[bool, list[str], bool, bool] | None:
        """Return whether the mode is train mode, the modules that change buffers, whether passes keep hidden state, and
        whether they are repeatable; None if memory runs out."""
        micro, tolerance = sample.load()[-1], self._objective.report.tolerance

        def numbers() -> dict[str, float]:
            return self._one_batch.numbers(micro)

        try:
            mode = DeterministicMode.of(self._model, lambda: list(numbers().values()), self._objective.modules)
            if mode.whole:  # two passes in train mode agreed to 1e-6, below `tolerance`: there is no state to find
                return True, list(mode.moving), False, True
            hidden = find_hidden_state(self._model, self._objective.modules, numbers, tolerance)
            with mode.passes():
                generators, first = Generators.now(), numbers()
                same = all(relative(number, first[name]) <= tolerance for name, number in numbers().items())
                repeats = same and generators.unchanged()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        return mode.whole, list(mode.moving), bool(hidden.off), repeats or bool(mode.moving)

    def _accumulate(self, sample: AuditSample, factor: float = 1.0) -> "_SketchedGradient | None":
        """Accumulate a gradient as training does; return None on all processes if memory runs out."""
        micro_batches = self._process_group.run_on_all(sample.load)
        try:
            losses = self._accumulator.accumulate(micro_batches, factor).losses
        except WindowOutOfMemoryError:
            give_back_memory()
            return None
        loss = gathered([losses], self._accelerator)[0].total()
        return self._take(loss, self._accumulated_gradients(), factor)

    def _reference(self, sample: AuditSample) -> "tuple[str, AuditSample | None, _SketchedGradient | None]":
        """Return the kind of reference, its rows, and the gradient to compare with."""
        one = sample.in_one() if self._one_batch.fits(sample) else None
        wanted = self._measured(one)
        if self._process_group.broadcast(wanted is not None):
            return ONE_BATCH, one, wanted
        other = sample.cut_differently()
        return ANOTHER_CUT, other, None if other is None else self._accumulate(other)

    def _rounding(
        self,
        sample: AuditSample,
        accumulated: "_SketchedGradient",
        of_one: "tuple[AuditSample | None, _SketchedGradient | None] | None",
    ) -> float | None:
        """Measure rounding: that of one batch, and that of an accumulated gradient if it may round in another way.

        Args:
            of_one: the one batch and its gradient; None if the reference is another cut.
        """
        found = [] if of_one is None else [self._rounding_of_one(*of_one)]
        if not found or self._objective.computes_fewer_positions:
            found.append(self._rounding_of_cut(sample, accumulated))
        return max((each for each in found if each is not None), default=None)

    def _rounding_of_one(self, one: AuditSample | None, wanted: "_SketchedGradient | None") -> float | None:
        """Measure the rounding of one batch: compute it again with its rows in reverse and a third of the loss."""
        turned = self._measured(None if one is None else one.reversed(), _THIRD)
        return self._process_group.broadcast(None if turned is None or wanted is None else turned.error(wanted))

    def _rounding_of_cut(self, sample: AuditSample, accumulated: "_SketchedGradient") -> float | None:
        """Measure the rounding of an accumulated gradient in the same way."""
        turned = self._accumulate(sample.reversed(), _THIRD)
        return None if turned is None else self._process_group.broadcast(turned.error(accumulated))

    def _measured(self, one: AuditSample | None, factor: float = 1.0) -> "_SketchedGradient | None":
        """Sketch the gradient of one batch; return None if there is no such batch, or memory runs out."""
        found = self._one_batch.gradient(one, factor)
        if found is None:
            self._accumulator.zero_gradients()
            give_back_memory()
            return None
        loss, gradients = found
        return self._take(loss, dict(zip(self._names, gradients, strict=True)), factor)

    def _accumulated_gradients(self) -> dict[str, Tensor | None]:
        return dict(zip(self._names, (p.grad for p in self._strategy.parameters), strict=True))

    @property
    def _names(self) -> list[str]:
        """The names of the strategy's weights, which may be frozen and unfrozen between audits."""
        names = {id(p): name for name, p in self._model.named_parameters()}
        return [names.get(id(p), f"parameter {n} outside of the model") for n, p in enumerate(self._strategy.weights)]

    def _take(self, loss: float, gradients: Mapping[str, Tensor | None], factor: float) -> "_SketchedGradient":
        """Sketch a gradient, divided by a factor, on the main process, and then drop the gradient."""
        sketch = GradientSketch()
        for name, gradient in gradients.items():
            whole = None if gradient is None else whole_tensor(gradient)  # together with the other processes
            if whole is not None and self._process_group.is_main:
                sketch.add(name, whole if factor == 1 else whole / factor)
        self._accumulator.zero_gradients()
        return _SketchedGradient(sketch, loss)


@dataclass(frozen=True)
class _SketchedGradient:
    """The sketch of a gradient, and a loss. The sketch is empty on all but the main process."""

    sketch: GradientSketch
    loss: float

    def error(self, wanted: "_SketchedGradient") -> float:
        """Return the norm of the difference from another gradient, relative to the norm of that gradient."""
        return self.sketch.minus(wanted.sketch).norm() / (wanted.sketch.norm() or 1.0)

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.sketch.norm()) and math.isfinite(self.loss)


def _compared(n_rows: int, reference: str, found: _SketchedGradient, wanted: _SketchedGradient | None) -> Audit | None:
    if wanted is None or not (found.is_finite and wanted.is_finite):
        return None
    norms = found.sketch.minus(wanted.sketch).norms()
    total = sum(norm**2 for norm in norms.values()) or 1.0
    by_size = sorted(norms, key=lambda name: -norms[name])
    shares = {name: norms[name] ** 2 / total for name in by_size if norms[name]}
    loss = abs(found.loss - wanted.loss) / (abs(wanted.loss) or 1.0)
    return Audit(n_rows, reference, found.error(wanted), shares, loss)
