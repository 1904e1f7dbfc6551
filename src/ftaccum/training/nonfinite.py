"""Updates whose loss or gradient is not finite: which rows are to blame, what is told, and when a run ends for it."""

import math
from collections.abc import Sequence
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

_ALL_TOLD = 10  # updates; of those that come after, every power of two, lest a log be flooded
_NAMED = 8  # rows at most
_CALM = "Lower `learning_rate` or `gradient_clip_norm`, or lengthen the warm-up"


@dataclass(frozen=True)
class NonFiniteUpdate:
    """What was not finite in an update that was skipped for it. All processes have one, or none has.

    Attributes:
        update: its number, from 1.
        grad_norm: of the whole gradient.
        loss: of the window, this process's part.
        of_loss: whether the loss of any pass on any process was not finite, and not only the gradient.
        suspects: the passes of this process whose loss was not.
        n_passes: of this process.
        scale: of fp16 gradients, after it fell; None without a gradient scaler.
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
        """Whether it is what a gradient scaler is there for: in fp16, the first updates of a run are skipped so."""
        return self.scale is not None and not self.of_loss


@dataclass
class NonFiniteCounts:
    """Updates that were not finite. All that the next ones depend on: a run that is resumed goes on from these.

    Attributes:
        in_a_row: the last ones; an update that is finite ends the row.
        faults: over the run, without overflows.
        overflows: over the run, of which a gradient scaler took care.
        ended: why the run was ended for it, if it was.
    """

    in_a_row: int = 0
    faults: int = 0
    overflows: int = 0
    ended: str = ""

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Whoever goes on with a run that was ended wants it to go on."""
        vars(self).update(state_dict | {"ended": "", "in_a_row": 0 if state_dict["ended"] else state_dict["in_a_row"]})

    def is_sound(self) -> bool:
        """Whether the weights are beyond suspicion: they may be why several updates in a row are not finite."""
        return self.in_a_row <= bool(self.ended)

    def one_more(self, fault: NonFiniteUpdate) -> int:
        """Counts it, and says which one of its kind it is."""
        self.in_a_row += 1
        if fault.is_overflow:
            self.overflows += 1
            return self.overflows
        self.faults += 1
        return self.faults


@dataclass(frozen=True)
class _Looked:
    """What one process found, or all of them together, of rows by position.

    Attributes:
        loss: of the window, as far as it was theirs.
        found: rows that have a loss by themselves that is not finite, and that loss.
        n_tried: rows that were run by themselves.
        together: the rows of one pass with such a loss.
        throughout: whether all passes had.
    """

    loss: float
    found: dict[int, float]
    n_tried: int
    together: Sequence[int]
    throughout: bool

    @classmethod
    def of_all(cls, looked: Sequence["_Looked"]) -> "_Looked":
        return cls(
            loss=sum(each.loss for each in looked),
            found=dict(sorted(pair for each in looked for pair in each.found.items())),
            n_tried=sum(each.n_tried for each in looked),
            together=max((each.together for each in looked), key=len),
            throughout=all(each.throughout for each in looked),
        )

    @property
    def blames_the_model(self) -> bool:
        """Whether every row that was tried is so."""
        return self.throughout and 1 < self.n_tried == len(self.found)


class NonFiniteHandler:
    """Skipped updates whose loss or gradient is not finite: which rows cause them, and when they end the run.

    All processes call it alike, and come to the same.
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
    ) -> None:
        """Create a handler.

        Args:
            model: not wrapped, so that each process may run it alone.
            loader: loads the training rows.
            raises: whether the first such update ends the run; an overflow in fp16 does not.
            patience: so many such updates or overflows in a row end the run; None for any number.
        """
        self._model, self._objective, self._loader, self._process_group = model, objective, loader, process_group
        self._device, self._raises, self._patience = device, raises, patience
        self.counts = NonFiniteCounts()

    def window_done(self, fault: NonFiniteUpdate | None) -> None:
        """After each update.

        Raises:
            DivergedError: on all processes, where the run is to end.
        """
        if fault is None:
            self.counts.in_a_row = 0
            return
        nth = self.counts.one_more(fault)
        ended_by = self._ended_by(fault)
        if ended_by is None and nth > _ALL_TOLD and nth & (nth - 1):
            return
        if fault.is_overflow and ended_by is None:
            logger.warning(
                f"Update {fault.update} is skipped: its gradient overflowed in fp16. The scale is {fault.scale:.10g} "
                f"now.{_fewer(nth)}"
            )
            return
        looked = self._look(fault)
        said = f"Update {fault.update} is skipped: {self._describe(fault, looked)}"
        if ended_by is not None:
            rows = tuple(self._loader.name_of(row) for row in looked.found)
            self.counts.ended = f"{said} {ended_by} {_remedy(fault, looked)}"
            raise DivergedError(self.counts.ended, fault.update, rows)
        logger.warning(said + _fewer(nth))

    def _ended_by(self, fault: NonFiniteUpdate) -> str | None:
        if self._raises and not fault.is_overflow:
            return "The run ends here, since `on_nonfinite` is 'error'."
        if self._patience is not None and self.counts.in_a_row >= self._patience:
            return f"It is number {self.counts.in_a_row} in a row, at which the run ends (`nonfinite_patience`)."
        return None

    def _look(self, fault: NonFiniteUpdate) -> _Looked:
        """What all processes find, each among its own rows."""
        own = [micro for micro in fault.suspects if not micro.is_dummy]  # a dummy's batch is none of its rows
        places = [(micro, place) for micro in own for place in range(len(micro.slice.rows))]
        found: dict[int, float] = {}
        n_tried = 0
        with inspection_mode(self._model, *self._objective.modules):
            for micro, place in places:
                loss = self._loss_of(micro, place)
                n_tried += loss is not None
                if loss is not None and not math.isfinite(loss):
                    found[micro.slice.rows[place]] = loss
                if len(found) == _NAMED:
                    break
        together = own[0].slice.rows if own else ()
        mine = _Looked(fault.loss, found, n_tried, together, throughout=len(fault.suspects) == fault.n_passes)
        return _Looked.of_all(self._process_group.gather(mine))

    def _loss_of(self, micro: MicroBatch, place: int) -> float | None:
        """The loss of one of its rows by itself; None where it has none, or cannot be run so."""
        try:
            row = self._loader.row_of(micro, place)
            batch = fresh_batch(row.batch, self._device)
            means = self._objective.means(self._model, batch, row.counts, row.terms)[0]
            return sum(mean.item() for mean in means.values()) if means else None
        except Exception:  # a head that takes no single row, or not this one: the run must not end for it
            return None

    def _describe(self, fault: NonFiniteUpdate, looked: _Looked) -> str:
        if not fault.of_loss:
            return (
                f"the norm of its gradient is {fault.grad_norm}, while its loss, {looked.loss:.4g}, is finite. So it "
                "came of the backward pass, and no row can be named."
            )
        if not looked.found:
            rows = [self._loader.name_of(row) for row in looked.together]
            of_pass = f" One pass with such a loss had {_listed(rows)}." if rows else ""
            return f"its loss is {looked.loss}, although each row alone has a finite loss.{of_pass}"
        rows = [f"{self._loader.name_of(row)} ({loss})" for row, loss in looked.found.items()]
        every = " That is every row that was tried, as if weights were not finite." if looked.blames_the_model else ""
        return f"its loss is {looked.loss}. Rows whose own loss is not finite: {_listed(rows)}.{every}"


def _listed(names: Sequence[str]) -> str:
    rest = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    *first, last = [*names[:_NAMED], *rest]
    return f"{', '.join(first)} and {last}" if first else last


def _fewer(nth: int) -> str:
    return " Of those to come, the 16th is told, the 32nd, and so on." if nth == _ALL_TOLD else ""


def _remedy(fault: NonFiniteUpdate, looked: _Looked) -> str:
    if looked.found and not looked.blames_the_model:
        return "Fix or drop these rows."
    bf16 = "" if fault.scale is None else ", or use `mixed_precision='bf16'`, which does not overflow as fp16 does"
    return f"{_CALM}{bf16}."
