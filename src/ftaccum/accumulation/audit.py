"""The gradient of a real window, computed a second time from the same rows, and compared.

Before training, a loss is measured on a few rows; an audit looks at the rows of an update. It accumulates the gradient
as training does, and holds it against the gradient of one unweighted batch of the same rows, through the model's own
loss. Where one batch does not fit in memory, the reference is another cut of the window, and faults that both cuts
share stay invisible. Both gradients are computed without dropout. Only sketches of them are kept.
"""

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..data.loader import LocalRows, MicroBatch
from ..data.prefetch import LocalWindow, WindowLoader
from ..objective.batch_changes import fresh_batch
from ..objective.deterministic_forward import DeterministicMode
from ..objective.gradient_sketch import GradientSketch
from ..objective.hidden_state import find_hidden_state
from ..objective.normalizer import gathered
from ..objective.objective import Objective
from ..objective.probe import relative
from ..runtime.gradients.plain import GradientStrategy
from ..runtime.host import free_on_host, peak_of_process
from ..runtime.memory import WindowOutOfMemoryError, give_back_memory, is_out_of_memory
from ..runtime.model_context import run_eagerly
from ..runtime.module_attributes import preserve_attributes
from ..runtime.process_group import ProcessGroup
from ..runtime.state_guards import Generators
from .accumulator import GradientAccumulator
from .audit_rows import AuditRows, part_of

# How many times as large as a micro-batch one batch may be. Attention over packed rows grows with its square.
_LARGEST, _LARGEST_PACKED = 8, 4

_THIRD = 1 / 3  # a factor that rounds every number anew
ONE_BATCH, ANOTHER_CUT = "one batch", "another cut"


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        n_rows: rows audited, on all processes.
        reference: "one batch" or "another cut".
        error: ‖accumulated gradient − reference‖ / ‖reference‖.
        parameters: the share of each parameter in the square of the difference, largest first.
        loss_error: relative difference of the losses.
        rounding: how far a gradient is from itself with its rows in reverse order; None where that was not measured.
        keeps_state: whether a forward pass changes what the next one returns, by state that is in no buffer.
    """

    n_rows: int
    reference: str
    error: float
    parameters: Mapping[str, float]
    loss_error: float
    rounding: float | None = None
    keeps_state: bool = False


class GradientAuditor:
    """Audits windows. All processes call it alike. Weights, gradients, buffers and generators are left as they were."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        objective: Objective,
        strategy: GradientStrategy,
        process_group: ProcessGroup,
        accumulator: GradientAccumulator,
        window_loader: WindowLoader,
    ) -> None:
        """Create an auditor.

        Args:
            model: not wrapped for several processes.
            accumulator: one that training does not use.
        """
        self._accelerator, self._model, self._objective = accelerator, model, objective
        self._strategy, self._process_group = strategy, process_group
        self._accumulator, self._window_loader = accumulator, window_loader
        self._mode: DeterministicMode | None = None
        self._keeps_state, self._repeats = False, True

    @property
    def is_possible(self) -> bool:
        """Whether rows can be loaded a second time and run one by one, with the same outputs: a model may draw in eval
        mode as well."""
        if isinstance(self._model, FSDPModule):  # the main process cannot run it alone
            return False
        takes_single_rows = self._objective.report.in_training.complaint is None
        return takes_single_rows and self._window_loader.loader.repeats and (self._repeats or self._keeps_state)

    def audit(self, local_window: LocalWindow, *, whole: bool, tolerance: float | None) -> Audit | None:
        """Audit a window, whose gradient has not been accumulated yet.

        Args:
            whole: whether to audit all of it, or up to four of its micro-batches.
            tolerance: the error beyond which rounding is measured on these rows; None to measure it in any case.

        Returns:
            None where there is nothing to compare: memory ran out, gradients are not finite, or no row has loss items.
        """
        rows = local_window.window.rows if whole else part_of(local_window, self._process_group)
        sample = AuditRows.of(rows, local_window.window, self._window_loader)
        with ExitStack() as stack:
            stack.callback(self._accumulator.zero_gradients)
            stack.enter_context(run_eagerly(self._model))
            stack.enter_context(preserve_attributes(self._model, *self._objective.modules))
            if (mode := self._deterministic_mode(sample)) is None or not self.is_possible:
                return None
            stack.enter_context(mode.passes())
            if (accumulated := self._accumulate(sample)) is None:
                return None
            reference, wanted = self._reference(sample)
            audit = self._process_group.run_on_main(lambda: _compared(len(rows), reference, accumulated, wanted))
            if audit is None:
                return None
            rounding = None
            if tolerance is None or audit.error > tolerance:
                rounding = self._rounding(sample, reference, accumulated, wanted)
        return replace(audit, rounding=rounding, keeps_state=self._keeps_state)

    def _deterministic_mode(self, sample: AuditRows) -> DeterministicMode | None:
        """Return how to run the model without dropout, as the main process finds out in the first audit; None where
        memory runs out."""
        if self._mode is None:
            found = self._process_group.run_on_main(lambda: self._find_mode(sample))
            if found is None:
                return None
            whole, moving, self._keeps_state, self._repeats = found
            mode = DeterministicMode(self._model, whole, {}, self._objective.modules)
            modules = mode.named_modules()
            self._mode = replace(mode, moving={name: modules[name] for name in moving})
        return self._mode

    def _find_mode(self, sample: AuditRows) -> tuple[bool, list[str], bool, bool] | None:
        """Return what there is to know of the mode: whether it is train mode, the modules that move buffers, whether
        passes keep state, and whether they can be repeated."""
        micro, tolerance = self._load(sample)[-1], self._objective.report.tolerance

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

    def _accumulate(self, sample: AuditRows, factor: float = 1.0) -> "_Measured | None":
        """Accumulate a gradient as training does; None on all processes where memory runs out."""
        micro_batches = self._process_group.run_on_all(lambda: self._load(sample))
        try:
            losses = self._accumulator.accumulate(micro_batches, factor).losses
        except WindowOutOfMemoryError:
            give_back_memory()
            return None
        loss = gathered([losses], self._accelerator)[0].total()
        return self._take(loss, self._accumulated_gradients(), factor)

    def _reference(self, sample: AuditRows) -> tuple[str, "_Measured | None"]:
        """Compute the gradient to compare with, and say what it is of."""
        wanted: _Measured | None = None

        def one_batch() -> bool:
            nonlocal wanted
            wanted = self._one_batch(sample.in_one()) if self._fits(sample) else None
            return wanted is not None

        if self._process_group.run_on_main(one_batch):
            return ONE_BATCH, wanted
        return ANOTHER_CUT, self._accumulate(sample.cut_otherwise(self._window_loader))

    def _rounding(
        self, sample: AuditRows, reference: str, accumulated: "_Measured", wanted: "_Measured | None"
    ) -> float | None:
        """Measure what rounding makes of a gradient: its rows in reverse order, and the loss times a third."""
        if reference == ONE_BATCH:

            def again() -> float | None:
                turned = self._one_batch(sample.in_one().reversed(), _THIRD)
                return None if turned is None or wanted is None else turned.error(wanted)

            return self._process_group.run_on_main(again)
        turned = self._accumulate(sample.reversed(), _THIRD)
        return None if turned is None else self._process_group.broadcast(turned.error(accumulated))

    def _one_batch(self, sample: AuditRows, factor: float = 1.0) -> "_Measured | None":
        """Compute the gradient of one batch, on the main process; None where memory runs out.

        Args:
            factor: what the loss is multiplied by before the backward pass, and the gradient divided by after it: it
                changes how numbers are rounded, and nothing else.
        """
        (micro,) = self._load(sample)
        try:
            loss = self._unweighted_loss(micro)
            gradients = self._gradients(loss * factor) if loss.requires_grad else {}  # it may be a constant
        except RuntimeError as error:
            if self._process_group.is_single and not is_out_of_memory(error):
                raise
            self._accumulator.zero_gradients()
            give_back_memory()
            return None
        return self._take(loss.item(), gradients, factor)

    def _gradients(self, loss: Tensor) -> dict[str, Tensor | None]:
        """Return the gradient of a loss by parameter, on the main process.

        On several processes `backward` would run DDP's hooks, which take note of every parameter that is used.
        """
        scaled = loss if self._accelerator.scaler is None else self._accelerator.scaler.scale(loss)
        if self._process_group.is_single:
            scaled.backward()
            return self._accumulated_gradients()
        weights = self._strategy.weights
        return dict(zip(self._names, torch.autograd.grad(scaled, weights, allow_unused=True), strict=True))

    def _accumulated_gradients(self) -> dict[str, Tensor | None]:
        return dict(zip(self._names, (p.grad for p in self._strategy.parameters), strict=True))

    @cached_property
    def _names(self) -> list[str]:
        """The names of the strategy's weights."""
        names = {id(p): name for name, p in self._model.named_parameters()}
        return [names.get(id(p), f"parameter {n} outside of the model") for n, p in enumerate(self._strategy.weights)]

    def _fits(self, sample: AuditRows) -> bool:
        """Return whether one batch is likely to fit. Accelerators raise an error where it does not, and are asked; on a
        host, the process would be killed."""
        times = sample.times_largest
        if times > (_LARGEST_PACKED if self._window_loader.planner.packed else _LARGEST):
            return False
        if self._accelerator.device.type != "cpu":
            return True
        # No micro-batch so far has taken more than the process had at its peak, weights included.
        return times * peak_of_process() < free_on_host() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def _unweighted_loss(self, micro: MicroBatch) -> Tensor:
        batch = fresh_batch(micro.batch, self._accelerator.device)
        return self._objective.unweighted_loss(self._model, batch, micro.counts)

    def _take(self, loss: float, gradients: Mapping[str, Tensor | None], factor: float) -> "_Measured":
        """Sketch a gradient on the main process, divided by a factor, and drop it."""
        sketch = GradientSketch()
        for name, gradient in gradients.items() if self._process_group.is_main else ():
            if gradient is not None:
                sketch.add(name, gradient if factor == 1 else gradient / factor)
        self._accumulator.zero_gradients()
        return _Measured(sketch, loss)

    def _load(self, sample: AuditRows) -> list[MicroBatch]:
        """Collate this process's micro-batches."""
        share = sample.by_process[self._accelerator.process_index]
        (micro_batches,) = self._window_loader.loader.load([LocalRows(sample.rows, share, sample.seed)])
        return micro_batches


@dataclass(frozen=True)
class _Measured:
    """A gradient and a loss; on other processes than the main one the sketch is empty."""

    sketch: GradientSketch
    loss: float

    def error(self, wanted: "_Measured") -> float:
        """Return how far the gradient is from another one, relative to the norm of that."""
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
