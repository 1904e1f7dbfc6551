"""Audits, which check the gradient of a real window during training.

Before training, the self-check measures the loss on a few rows. An audit checks the rows of an update: it accumulates
their gradient as training does, and compares it with the gradient of one unweighted batch of the same rows. If one
batch does not fit in memory, the reference is another split of the window, and the audit misses faults that both splits
share. Both gradients are computed without dropout, and only their sketches are kept.
"""

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..data.loader import MicroBatch
from ..objective.batch_changes import fresh_batch
from ..objective.deterministic_forward import DeterministicMode
from ..objective.gradient_sketch import GradientSketch
from ..objective.hidden_state import find_hidden_state
from ..objective.normalizer import gathered
from ..objective.objective import Objective
from ..objective.probe import relative
from ..runtime.accumulation_backend import AccumulationBackend
from ..runtime.gradients.plain import GradientStrategy
from ..runtime.host import free_on_host, peak_of_process
from ..runtime.memory import WindowOutOfMemoryError, give_back_memory, is_out_of_memory
from ..runtime.model_context import run_eagerly
from ..runtime.module_attributes import preserve_attributes
from ..runtime.process_group import ProcessGroup
from ..runtime.state_guards import Generators
from .accumulator import GradientAccumulator
from .audit_sample import AuditSample

# The maximum size of one batch, in micro-batches. The attention over packed rows grows with the square of their length.
_LARGEST, _LARGEST_PACKED = 8, 4

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
    """

    n_rows: int
    reference: str
    error: float
    parameters: Mapping[str, float]
    loss_error: float
    rounding: float | None = None
    keeps_state: bool = False


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
        self._mode: DeterministicMode | None = None
        self._keeps_state, self._repeats = False, True

    @property
    def is_possible(self) -> bool:
        """Whether windows can be audited: the model runs single rows, and its passes are repeatable (it may draw random
        numbers even in eval mode)."""
        if isinstance(self._model, FSDPModule):  # the main process cannot run it alone
            return False
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
                if reference == ONE_BATCH:
                    rounding = self._rounding_of_one(compared, wanted)
                else:
                    rounding = self._rounding_of_cut(sample, accumulated)
        return replace(audit, rounding=rounding, keeps_state=self._keeps_state)

    def _deterministic_mode(self, sample: AuditSample) -> DeterministicMode | None:
        """Return the mode that runs the model without dropout, found in the first audit; None if memory runs out."""
        if self._mode is None:
            found = self._process_group.run_on_main(lambda: self._find_mode(sample))
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

        def losses() -> dict[str, float]:
            return {"loss": self._unweighted_loss(micro).item()}

        try:
            mode = DeterministicMode.of(self._model, lambda: list(losses().values()), self._objective.modules)
            hidden = find_hidden_state(self._model, self._objective.modules, losses, tolerance)
            with mode.passes():
                generators, first = Generators.now(), losses()["loss"]
                repeats = generators.unchanged() and relative(losses()["loss"], first) <= tolerance
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        return mode.whole, list(mode.moving), bool(hidden.off), repeats or bool(mode.moving)

    def _accumulate(self, sample: AuditSample, factor: float = 1.0) -> "_Measured | None":
        """Accumulate a gradient as training does; return None on all processes if memory runs out."""
        micro_batches = self._process_group.run_on_all(sample.load)
        try:
            losses = self._accumulator.accumulate(micro_batches, factor).losses
        except WindowOutOfMemoryError:
            give_back_memory()
            return None
        loss = gathered([losses], self._accelerator)[0].total()
        return self._take(loss, self._accumulated_gradients(), factor)

    def _reference(self, sample: AuditSample) -> "tuple[str, AuditSample | None, _Measured | None]":
        """Return the kind of reference, its rows, and the gradient to compare with."""
        if self._process_group.run_on_main(lambda: self._fits(sample)):
            one, wanted = sample.in_one(), None

            def one_batch() -> bool:
                nonlocal wanted
                wanted = None if one is None else self._one_batch(one)
                return wanted is not None

            if self._process_group.run_on_main(one_batch):
                return ONE_BATCH, one, wanted
        other = sample.cut_otherwise()
        return ANOTHER_CUT, other, None if other is None else self._accumulate(other)

    def _rounding_of_one(self, one: AuditSample | None, wanted: "_Measured | None") -> float | None:
        """Measure the rounding of one batch: compute it again with its rows in reverse and a third of the loss."""

        def again() -> float | None:
            turned = None if one is None else self._one_batch(one.reversed(), _THIRD)
            return None if turned is None or wanted is None else turned.error(wanted)

        return self._process_group.run_on_main(again)

    def _rounding_of_cut(self, sample: AuditSample, accumulated: "_Measured") -> float | None:
        """Measure the rounding of an accumulated gradient in the same way."""
        turned = self._accumulate(sample.reversed(), _THIRD)
        return None if turned is None else self._process_group.broadcast(turned.error(accumulated))

    def _one_batch(self, sample: AuditSample, factor: float = 1.0) -> "_Measured | None":
        """Compute the gradient of one batch, on the main process; return None if memory runs out.

        Args:
            factor: multiplies the loss and divides the gradient, which changes nothing but rounding.
        """
        (micro,) = sample.load()
        try:
            loss = self._unweighted_loss(micro)
            gradients = self._gradients(loss * factor) if loss.requires_grad else {}  # the loss may be a constant
        except RuntimeError as error:
            if self._process_group.is_single and not is_out_of_memory(error):
                raise
            self._accumulator.zero_gradients()
            give_back_memory()
            return None
        return self._take(loss.item(), gradients, factor)

    def _gradients(self, loss: Tensor) -> dict[str, Tensor | None]:
        """Return the gradient of a loss by parameter, on the main process.

        On several processes, do not call `backward`, which would trigger DDP's hooks.
        """
        scaled = loss if self._accelerator.scaler is None else self._accelerator.scaler.scale(loss)
        if self._process_group.is_single:
            scaled.backward()
            return self._accumulated_gradients()
        weights = self._strategy.weights
        return dict(zip(self._names, torch.autograd.grad(scaled, weights, allow_unused=True), strict=True))

    def _accumulated_gradients(self) -> dict[str, Tensor | None]:
        return dict(zip(self._names, (p.grad for p in self._strategy.parameters), strict=True))

    @property
    def _names(self) -> list[str]:
        """The names of the strategy's weights, which may be frozen and unfrozen between audits."""
        names = {id(p): name for name, p in self._model.named_parameters()}
        return [names.get(id(p), f"parameter {n} outside of the model") for n, p in enumerate(self._strategy.weights)]

    def _fits(self, sample: AuditSample) -> bool:
        """Return whether to try one batch. On an accelerator, trying is safe; on a CPU, the process could be killed."""
        times = sample.times_largest
        if times > (_LARGEST_PACKED if sample.is_packed else _LARGEST):
            return False
        if self._accelerator.device.type != "cpu":
            return True
        # The peak memory of the process is an upper bound for each micro-batch so far.
        return times * peak_of_process() < free_on_host() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def _unweighted_loss(self, micro: MicroBatch) -> Tensor:
        batch = fresh_batch(micro.batch, self._accelerator.device)
        return self._objective.unweighted_loss(self._model, batch, micro.counts)

    def _take(self, loss: float, gradients: Mapping[str, Tensor | None], factor: float) -> "_Measured":
        """Sketch a gradient, divided by a factor, on the main process, and then drop the gradient."""
        sketch = GradientSketch()
        for name, gradient in gradients.items() if self._process_group.is_main else ():
            if gradient is not None:
                sketch.add(name, gradient if factor == 1 else gradient / factor)
        self._accumulator.zero_gradients()
        return _Measured(sketch, loss)


@dataclass(frozen=True)
class _Measured:
    """The sketch of a gradient, and a loss. The sketch is empty on all but the main process."""

    sketch: GradientSketch
    loss: float

    def error(self, wanted: "_Measured") -> float:
        """Return the norm of the difference from another gradient, relative to the norm of that gradient."""
        return self.sketch.minus(wanted.sketch).norm() / (wanted.sketch.norm() or 1.0)

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.sketch.norm()) and math.isfinite(self.loss)


def _compared(n_rows: int, reference: str, found: _Measured, wanted: _Measured | None) -> Audit | None:
    if wanted is None or not (found.is_finite and wanted.is_finite):
        return None
    norms = found.sketch.minus(wanted.sketch).norms()
    total = sum(norm**2 for norm in norms.values()) or 1.0
    by_size = sorted(norms, key=lambda name: -norms[name])
    shares = {name: norms[name] ** 2 / total for name in by_size if norms[name]}
    loss = abs(found.loss - wanted.loss) / (abs(wanted.loss) or 1.0)
    return Audit(n_rows, reference, found.error(wanted), shares, loss)
