"""Audits of the windows of a loop that is not ftaccum's."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from ..accumulation.accumulator import GradientAccumulator
from ..accumulation.audit import GradientAuditor
from ..accumulation.audit_sample import AuditedWindow
from ..accumulation.buffers import MovingBuffers, SyncedBuffers
from ..data.loader import MicroBatch
from ..objective.objective import Objective
from ..objective.rounding import Rounding
from ..planning.audit_schedule import AuditSchedule, AuditSize
from ..runtime.gradients.averaged import AveragedGradients
from ..runtime.graph_leaves import leaves_besides
from ..runtime.loop_accelerator import LoopAccelerator
from ..runtime.process_group import ProcessGroup
from ..runtime.state_guards import preserve_gradients
from ..runtime.watched_state import Roots, WatchedState
from ..training.audit import AuditHandler
from .audit_batches import AuditBatches


class WindowAudits:
    """Audits some windows before their passes, and reports gradients that are not exact.

    Attributes:
        found: the audits so far, with the keys of `Result.audits`.
        during: returns a context manager that surrounds each audit.
    """

    def __init__(
        self,
        accelerator: LoopAccelerator,
        model: nn.Module,
        objective: Objective,
        process_group: ProcessGroup,
        fill: Mapping[str, int],
        schedule: AuditSchedule,
        on_inexact: str,
        roots: Roots,
    ) -> None:
        """Args:
        model: the model inside all wrappers.
        fill: the padding of columns when batches are joined.
        on_inexact: "error", "warn" or "ignore".
        roots: returns the functions and modules that compute the loss, by name.
        """
        self._state = WatchedState(model, roots)
        self.during: Callable[[], AbstractContextManager[None]] = nullcontext
        self._model, self._objective = model, objective
        self._process_group, self._fill = process_group, fill
        self.found: list[dict[str, Any]] = []
        strategy = AveragedGradients(model, *objective.modules)
        buffers = SyncedBuffers(MovingBuffers(model, process_group, objective.modules))
        accumulator = GradientAccumulator(accelerator, model, objective, strategy, process_group, buffers)
        accumulator.before_backward = self._keep_others
        self._others: list[tuple[Tensor, Tensor | None]] = []
        dtypes = {p.dtype for p in model.parameters()}
        self._n_windows = 0
        self._handler = AuditHandler(
            GradientAuditor(accelerator, model, objective, strategy, process_group, accumulator),
            schedule,
            objective.report,
            process_group,
            self._state,
            lambda entry: self.found.append(asdict(entry)),
            rounding=Rounding.of(dtypes, accelerator.mixed_precision),
            on_inexact=on_inexact,
        )
        self._handler.during = self._preserving

    def before_window(self, micro_batches: Sequence[MicroBatch], update: int | None = None, epoch: int = 0) -> None:
        """Audit a window if it is due. Gradients, weights, buffers and generators stay as they are.

        All processes must make the same call.

        Args:
            update: the number of the update, from 1; None to count the calls.
            epoch: the epoch that it belongs to.

        Raises:
            InexactLossError: on all processes, if the gradient is not exact and `on_inexact` is "error".
        """
        self._n_windows += 1
        self._state.look()

        def take(size: AuditSize) -> AuditBatches | None:
            return AuditBatches.of(micro_batches, self._objective, self._process_group, self._fill, size)

        self._handler.before_update(AuditedWindow(update or self._n_windows, epoch, micro_batches, take))

    @contextmanager
    def _preserving(self) -> Iterator[None]:
        """Restore all gradients on exit, also those of weights that neither the model nor the loss holds."""
        with ExitStack() as stack:
            stack.enter_context(self.during())
            for module in (self._model, *self._objective.modules):
                stack.enter_context(preserve_gradients(module))
            stack.callback(self._restore_others)
            yield

    def _keep_others(self, loss: Tensor) -> None:
        """Take away the gradients of other weights before the first backward pass that reaches them."""
        kept = [leaf for leaf, _ in self._others]
        for leaf in leaves_besides(loss, [*self._known_parameters(), *kept]):
            self._others.append((leaf, leaf.grad))
            leaf.grad = None

    def _restore_others(self) -> None:
        for leaf, gradient in self._others:
            leaf.grad = gradient
        self._others.clear()

    def _known_parameters(self) -> Iterator[Tensor]:
        for module in (self._model, *self._objective.modules):
            yield from module.parameters()
