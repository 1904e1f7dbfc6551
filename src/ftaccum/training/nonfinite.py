"""Updates whose loss or gradient is not finite: finding the rows at fault, reporting them and ending the run."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.loader import Loader, MicroBatch
from ..errors import DivergedError
from ..objective.batch_changes import fresh_batch
from ..objective.objective import Objective
from ..runtime.log import logger
from ..runtime.process_group import ProcessGroup
from ..runtime.state_guards import inspection_mode

_ALL_REPORTED = 10  # the first faults are all reported; later ones only if their number is a power of two
_NAMED = 8  # the maximum number of rows to name in a message
_CALM = "Lower `learning_rate` or `gradient_clip_norm`, or lengthen the warm-up"


@dataclass(frozen=True)
class NonFiniteUpdate:
    """An update that was skipped because its loss or gradient was not finite; all processes have one, or none has.

    Attributes:
        update: the number of the update, from 1.
        grad_norm: the norm of the whole gradient.
        loss: this process's part of the window's loss.
        of_loss: whether the loss of any micro-batch on any process was not finite, and not only the gradient.
        suspects: this process's micro-batches whose loss was not finite.
        n_passes: the number of micro-batches that this process ran.
        scale: the loss scale of fp16 after it was lowered; None without a gradient scaler.
    """

    update: int
    grad_norm: float
    loss: float
    of_loss: bool
    suspects: list[MicroBatch]
    n_passes: int
    scale: float | None

    @property
    def is_overflow(self) -> bool:
        """Whether only fp16's range was exceeded, as is normal in the first updates with a gradient scaler."""
        return self.scale is not None and not self.of_loss


@dataclass
class NonFiniteCounts:
    """Counts of updates that were not finite, which checkpoints save.

    Attributes:
        in_a_row: the number of such updates since the last finite one.
        faults: the number of such updates in the run, without overflows.
        overflows: the number of overflows in the run, which a gradient scaler handled.
        ended: the message with which such updates ended the run; empty if they did not.
    """

    in_a_row: int = 0
    faults: int = 0
    overflows: int = 0
    ended: str = ""

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the counts; if such updates ended the run, reset `in_a_row` so that the resumed run can continue."""
        vars(self).update(state_dict | {"ended": "", "in_a_row": 0 if state_dict["ended"] else state_dict["in_a_row"]})

    def is_sound(self) -> bool:
        """Return whether to trust the weights: the last update was finite, or the first that was not ended the run."""
        return self.in_a_row == 0 or (bool(self.ended) and self.in_a_row == 1)

    def one_more(self, fault: NonFiniteUpdate) -> int:
        """Count an update, and return its number among those of its kind (faults or overflows), from 1."""
        self.in_a_row += 1
        if fault.is_overflow:
            self.overflows += 1
            return self.overflows
        self.faults += 1
        return self.faults


@dataclass(frozen=True)
class _Findings:
    """The findings of one process, or of all of them together. Rows are given by position.

    Attributes:
        loss: the window's loss, or this process's part of it.
        found: the rows whose loss is not finite when they are run separately, each with that loss. For a loss over the
            window, the rows with such a number among its inputs, each with that number.
        n_tried: the number of rows that were run separately.
        together: the rows of one micro-batch whose loss is not finite.
        throughout: whether no micro-batch had a finite loss.
    """

    loss: float
    found: dict[int, float]
    n_tried: int
    together: Sequence[int]
    throughout: bool

    @classmethod
    def of_all(cls, findings: Sequence["_Findings"]) -> "_Findings":
        return cls(
            loss=sum(each.loss for each in findings),
            found=dict(sorted(pair for each in findings for pair in each.found.items())),
            n_tried=sum(each.n_tried for each in findings),
            together=max((each.together for each in findings), key=len),
            throughout=all(each.throughout for each in findings),
        )

    @property
    def blames_the_model(self) -> bool:
        """Whether all micro-batches and all rows tried had such a loss, so that the weights may be at fault."""
        return self.throughout and 1 < self.n_tried == len(self.found)


class NonFiniteHandler:
    """Reports skipped updates whose loss or gradient is not finite, finds the rows at fault, and may end the run.

    All processes must make the same calls, and reach the same result.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        loader: Loader,
        process_group: ProcessGroup,
        device: torch.device,
        *,
        raises: bool,
        patience: int | None,
        independent_passes: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Create a handler.

        Args:
            model: the model without DDP, which a process can run without the others.
            loader: loads the training rows.
            raises: whether the first such update ends the run, unless it is an overflow of fp16.
            patience: the number of such updates in a row, overflows included, that ends the run; None for no limit.
            independent_passes: returns a context in which each process may run any number of passes without gradients.
        """
        self._independent_passes = independent_passes
        self._model, self._objective, self._loader, self._process_group = model, objective, loader, process_group
        self._device, self._raises, self._patience = device, raises, patience
        self.counts = NonFiniteCounts()

    def window_done(self, fault: NonFiniteUpdate | None) -> None:
        """Count and report an update that was not finite. Must be called after each update.

        Args:
            fault: what was not finite; None if everything was.

        Raises:
            DivergedError: on all processes, if the run must end.
        """
        if fault is None:
            self.counts.in_a_row = 0
            return
        nth = self.counts.one_more(fault)
        ended_by = self._ended_by(fault)
        if ended_by is None and nth > _ALL_REPORTED and nth & (nth - 1):
            return
        if fault.is_overflow and ended_by is None:
            logger.warning(
                f"Update {fault.update} is skipped: its gradient overflowed in fp16. The loss scale is now "
                f"{fault.scale:.10g}.{_fewer(nth)}"
            )
            return
        findings = self._look(fault)
        message = f"Update {fault.update} is skipped: {self._describe(fault, findings)}"
        if ended_by is not None:
            rows = tuple(self._loader.name_of(row) for row in findings.found)
            self.counts.ended = f"{message} {ended_by} {_remedy(fault, findings)}"
            raise DivergedError(self.counts.ended, fault.update, rows)
        logger.warning(message + _fewer(nth))

    def _ended_by(self, fault: NonFiniteUpdate) -> str | None:
        if self._raises and not fault.is_overflow:
            return "The run ends here because `on_nonfinite` is 'error'."
        if self._patience is not None and self.counts.in_a_row >= self._patience:
            return (
                f"The number of such updates in a row has reached {self.counts.in_a_row}, so the run ends "
                "(`nonfinite_patience`)."
            )
        return None

    def _look(self, fault: NonFiniteUpdate) -> _Findings:
        """Run suspect rows separately on each process, and return the findings of all processes."""
        own = [
            micro for micro in fault.suspects if not micro.is_dummy
        ]  # a dummy's batch holds other rows than its slice
        places = [(micro, place) for micro in own for place in range(len(micro.slice.rows))]
        found: dict[int, float] = {}
        n_tried = 0
        with inspection_mode(self._model, *self._objective.modules), self._independent_passes():
            for micro, place in places:
                loss = self._loss_of(micro, place)
                n_tried += loss is not None
                if loss is not None and not math.isfinite(loss):
                    found[micro.slice.rows[place]] = loss
                if len(found) == _NAMED:
                    break
        together = own[0].slice.rows if own else ()
        mine = _Findings(fault.loss, found, n_tried, together, throughout=len(fault.suspects) == fault.n_passes)
        return _Findings.of_all(self._process_group.gather(mine))

    def _loss_of(self, micro: MicroBatch, place: int) -> float | None:
        """Return the loss of one row, run separately, or for a loss over the window a number that it reads of the row;
        None if the row has no loss items or cannot be run so."""
        try:
            row = self._loader.row_of(micro, place)
            batch = fresh_batch(row.batch, self._device)
            return self._objective.loss_of_row(self._model, batch, row.counts, row.terms)
        except Exception:  # the model may reject a single row, or this one, which must not end the run
            return None

    def _describe(self, fault: NonFiniteUpdate, findings: _Findings) -> str:
        if not fault.of_loss:
            return (
                f"the norm of its gradient is {fault.grad_norm}, but its loss, {findings.loss:.4g}, is finite. The "
                "fault is in the backward pass, so no row can be named."
            )
        if not findings.found and self._objective.is_over_window:
            return f"its loss is {findings.loss}, although all that it reads is finite. The fault is in `loss_fn`."
        if not findings.found:
            rows = [self._loader.name_of(row) for row in findings.together]
            of_pass = f" A micro-batch whose loss was not finite contains {_listed(rows)}." if rows else ""
            return f"its loss is {findings.loss}, but no row has a non-finite loss when run separately.{of_pass}"
        rows = [f"{self._loader.name_of(row)} ({loss})" for row, loss in findings.found.items()]
        every = (
            " These are all the rows that were run, so the weights may not be finite."
            if findings.blames_the_model
            else ""
        )
        kind = "with a number among the inputs of the loss that" if self._objective.is_over_window else "whose own loss"
        return f"its loss is {findings.loss}. Rows {kind} is not finite: {_listed(rows)}.{every}"


def _listed(names: Sequence[str]) -> str:
    rest = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    *first, last = [*names[:_NAMED], *rest]
    return f"{', '.join(first)} and {last}" if first else last


def _fewer(nth: int) -> str:
    return " From now on, only the 16th, the 32nd and so on are reported." if nth == _ALL_REPORTED else ""


def _remedy(fault: NonFiniteUpdate, findings: _Findings) -> str:
    if findings.found and not findings.blames_the_model:
        return "Fix or drop these rows."
    bf16 = "" if fault.scale is None else ", or use `mixed_precision='bf16'`, which does not overflow as fp16 does"
    return f"{_CALM}{bf16}."
