"""Audits of a run's updates: when they take place, what they find, and how the run reacts."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..accumulation.audit import Audit, GradientAuditor
from ..accumulation.audit_sample import AuditedWindow
from ..data.novelty import SeenValues
from ..errors import InexactLossError, InexactLossWarning, warn_user
from ..objective.report import ExactnessReport
from ..objective.rounding import Rounding
from ..planning.audit_schedule import AuditSchedule, AuditSize
from ..runtime.log import logger
from ..runtime.process_group import ProcessGroup
from ..runtime.watched_state import WatchedState
from ..tracking.ledger import AuditEntry
from .audit_report import Cause, cause_of, describe_finding

_LEAST = 1e-9  # relative errors up to this are always tolerated


class AuditHandler:
    """Audits windows before their updates, and handles findings as `on_inexact` says.

    All processes must make the same calls.

    Attributes:
        during: returns a context manager that surrounds each audit.
    """

    def __init__(
        self,
        auditor: GradientAuditor,
        schedule: AuditSchedule,
        report: ExactnessReport,
        process_group: ProcessGroup,
        state: WatchedState,
        record: Callable[[AuditEntry], None],
        *,
        rounding: Rounding,
        on_inexact: str,
    ) -> None:
        """Create a handler.

        Args:
            report: the measurements made before training.
            state: the state of the loss. Its owner calls `look` before each window.
            record: called with the ledger entry of each audit.
            rounding: the errors that count as rounding in the run's precision.
            on_inexact: "error", "warn" or "ignore".
        """
        self._auditor, self._schedule, self._report = auditor, schedule, report
        self._process_group, self._record = process_group, record
        self._rounding, self._on_inexact, self._state = rounding, on_inexact, state
        self.during: Callable[[], AbstractContextManager[None]] = nullcontext
        self._seen = SeenValues()
        self._causes: dict[str, int] = {}  # findings by cause
        # The rounding error of the first audit whose error exceeded the least tolerance; None until then.
        self._rounding_floor: float | None = None
        self._since = time.perf_counter()

    def before_update(self, window: AuditedWindow) -> None:
        """Audit a window if it is due.

        Raises:
            InexactLossError: on all processes, if the gradient is not exact and `on_inexact` is "error".
        """
        started = time.perf_counter()
        self._schedule.trained += started - self._since
        if self._may_audit:
            looks = self._schedule.takes_others  # if not, nobody needs to know which values are new
            is_new = looks and self._seen.add(window.micro_batches)
            flags = [is_new, bool(self._state.places), self._state.is_rare_change]
            is_new, is_changed, is_rare_change = self._process_group.any_of(flags)
            is_planned, schedule = self._schedule.is_due(window.update), self._schedule
            # Only the main process's clock decides, so that all processes agree.
            may_take = not is_planned and self._process_group.is_main
            may_take = may_take and schedule.may_take(
                is_new=is_new, is_changed=is_changed, is_rare_change=is_rare_change
            )
            if is_planned or ((looks or is_rare_change) and self._process_group.any(may_take)):
                size = schedule.size(window.update, is_new=is_new or is_changed)
                if self._report.window is not None:  # a loss over the window may not take fewer rows
                    size = AuditSize.WHOLE_WINDOW
                self._audit(window, started, is_planned=is_planned, is_rare_change=is_rare_change, size=size)
        self._since = time.perf_counter()

    @property
    def _may_audit(self) -> bool:
        """Whether more audits can take place; the same on all processes."""
        has_state = Cause.STATE.value in self._causes
        return self._schedule.audit is not False and not has_state and self._auditor.is_possible

    def state_dict(self) -> dict[str, Any]:
        schedule, seen = self._schedule.state_dict(), self._seen.state_dict()
        return {
            "schedule": schedule,
            "seen": seen,
            "causes": self._causes,
            "floor": self._rounding_floor,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._schedule.load_state_dict(state_dict["schedule"])
        self._seen.load_state_dict(state_dict["seen"])
        self._causes, self._rounding_floor = state_dict["causes"], state_dict["floor"]

    def _audit(
        self, window: AuditedWindow, started: float, *, is_planned: bool, is_rare_change: bool, size: AuditSize
    ) -> None:
        floor = self._rounding_floor
        tolerated = self._tolerance(floor or 0.0)  # errors up to this one need no measurement of rounding
        with self.during():
            sample = window.take(size)
            audit = None if sample is None else self._auditor.audit(sample, tolerance=tolerated)
        seconds = time.perf_counter() - started
        self._schedule.done(seconds, is_planned=is_planned, is_rare_change=is_rare_change)
        changed = self._state.places
        self._state.audited()
        if audit is None:
            return
        self._rounding_floor = audit.rounding if floor is None else floor
        tolerance = self._tolerance(max(self._rounding_floor or 0.0, audit.rounding or 0.0))
        self._record(
            AuditEntry(
                audit=window.update,
                epoch=window.epoch,
                rows=audit.n_rows,
                reference=audit.reference,
                error=audit.error,
                loss_error=audit.loss_error,
                tolerance=tolerance,
                seconds=seconds,
            )
        )
        logger.debug(
            f"Audit of update {window.update}: relative error {audit.error:.1e} of its gradient over {audit.n_rows} "
            f"rows, tolerance {tolerance:.1e}, {seconds:.2f} s."
        )
        cause = cause_of(audit, tolerance, self._rounding.most)
        if cause is not None:
            self._report_finding(audit, window.update, tolerance, cause, changed)

    def _tolerance(self, floor: float) -> float:
        return max(_LEAST, self._rounding.tolerance(floor))

    def _report_finding(
        self, audit: Audit, update: int, tolerance: float, cause: Cause, changed: Sequence[str]
    ) -> None:
        """Raise or warn, once per cause, unless the loss was already reported as inexact before training."""
        self._causes[cause.value] = self._causes.get(cause.value, 0) + 1
        if self._on_inexact == "ignore" or self._causes[cause.value] > 1 or self._report.inexact():
            return
        counted_by = " and ".join(dict.fromkeys(self._report.ways.values()))
        sentences = describe_finding(audit, update, tolerance, cause, counted_by, changed)
        if self._on_inexact == "error":
            raise InexactLossError([sentences])
        if self._process_group.is_main:
            warn_user(sentences, InexactLossWarning)
