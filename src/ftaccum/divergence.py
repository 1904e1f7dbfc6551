"""Updates whose loss or gradient is not finite: which rows are to blame, what is told, and when a run ends for it."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from accelerate.utils import send_to_device
from torch import nn

from .data import Loader, MicroBatch
from .errors import DivergedError
from .memory import Agreement
from .objective import Objective
from .side_effects import only_looking

_ALL_TOLD = 10  # updates; of those that come after, every power of two, lest a log be flooded
_NAMED = 8  # rows at most
_CALM = "Lower `learning_rate` or `gradient_clip_norm`, or lengthen the warm-up"


@dataclass(frozen=True)
class Fault:
    """What was not finite in an update that was skipped for it. All processes have one, or none has.

    Attributes:
        update: its number, from 1.
        grad_norm: of the whole gradient.
        loss: this process's part of it.
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
class Counts:
    """Updates that were not finite. All that the next ones depend on: a run that is resumed goes on from these.

    Attributes:
        in_a_row: the last ones; an update that is finite ends the row.
        faults: over the run, without overflows.
        overflows: over the run, of which a gradient scaler took care.
    """

    in_a_row: int = 0
    faults: int = 0
    overflows: int = 0

    def one_more(self, fault: Fault) -> int:
        """Counts it, and says the how manieth of its kind it is."""
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
    found: list[tuple[int, float]]
    n_tried: int
    together: Sequence[int]
    throughout: bool

    @classmethod
    def of_all(cls, looked: Sequence["_Looked"]) -> "_Looked":
        found = sorted(dict(pair for each in looked for pair in each.found).items())  # a window may have a row twice
        n_tried, together = sum(each.n_tried for each in looked), max((each.together for each in looked), key=len)
        return cls(sum(e.loss for e in looked), found, n_tried, together, all(e.throughout for e in looked))

    @property
    def blames_the_model(self) -> bool:
        """Whether every row that was tried is so."""
        return self.throughout and 1 < self.n_tried == len(self.found)


@dataclass
class Divergence:
    """Follows a run's updates. All processes call it alike, and come to the same.

    Attributes:
        model: not wrapped, so that a process may run it by itself.
        loader: of the training rows.
        tell: shows a sentence to the user.
        raises: whether the first fault ends the run; an overflow does not.
        patience: so many faults and overflows in a row do; None for any number.
    """

    model: nn.Module
    objective: Objective
    loader: Loader
    agreement: Agreement
    device: torch.device
    tell: Callable[[str], None]
    raises: bool
    patience: int | None
    counts: Counts = field(default_factory=Counts)

    def window_done(self, fault: Fault | None) -> None:
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
            self.tell(
                f"Update {fault.update} is skipped: its gradient overflowed in fp16. The scale is {fault.scale:g} "
                f"now.{_fewer(nth)}"
            )
            return
        looked = self._look(fault)
        said = f"Update {fault.update} is skipped: {self._in_words(fault, looked)}"
        if ended_by is not None:
            rows = tuple(self.loader.name_of(row) for row, _ in looked.found)
            raise DivergedError(f"{said} {ended_by} {_remedy(fault, looked)}", fault.update, rows)
        self.tell(said + _fewer(nth))

    def _ended_by(self, fault: Fault) -> str | None:
        if self.raises and not fault.is_overflow:
            return "The run ends here, since `on_nonfinite` is 'error'."
        if self.counts.in_a_row == self.patience:
            return f"It is number {self.patience} in a row, at which the run ends (`nonfinite_patience`)."
        return None

    def _look(self, fault: Fault) -> _Looked:
        """What all processes find, each among its own rows."""
        tried: list[tuple[int, float]] = []
        found: list[tuple[int, float]] = []
        for pair in self._losses_by_row(fault.suspects):
            tried.append(pair)
            found += [] if math.isfinite(pair[1]) else [pair]
            if len(found) == _NAMED:
                break
        together = next((micro.slice.rows for micro in fault.suspects if not micro.is_ghost), ())
        throughout = len(fault.suspects) == fault.n_passes
        mine = _Looked(fault.loss, found, len(tried), together, throughout)
        return _Looked.of_all(self.agreement.everyone(mine))

    def _losses_by_row(self, micro_batches: Sequence[MicroBatch]) -> Iterator[tuple[int, float]]:
        """The loss of each row by itself, in eval mode; of those that can be run so, and have one."""
        with only_looking(self.model):
            for row in (row for micro in micro_batches for row in self.loader.rows_apart(micro) if row.terms):
                try:
                    batch = send_to_device(row.batch, self.device)
                    means = self.objective.means(self.model, batch, row.counts, row.terms)[0]
                except Exception:  # a head that takes no single row, or not this one: the run must not end for it
                    continue
                yield row.slice.rows[0], sum(mean.item() for mean in means.values())

    def _in_words(self, fault: Fault, looked: _Looked) -> str:
        if not fault.of_loss:
            return (
                f"the norm of its gradient is {fault.grad_norm}, while its loss, {looked.loss:.4g}, is finite. So it "
                "came of the backward pass, and no row can be named."
            )
        if not looked.found:
            rows = self._names(looked.together)
            of_pass = f" One of its passes with such a loss had {rows}." if rows else ""
            return f"its loss is {looked.loss}, although no row's is by itself.{of_pass}"
        named = self._names([row for row, _ in looked.found], [f" ({loss})" for _, loss in looked.found])
        every = " That is every row that was tried, as if weights were not finite." if looked.blames_the_model else ""
        return f"its loss is {looked.loss}. Rows whose own loss is not finite: {named}.{every}"

    def _names(self, rows: Sequence[int], remarks: Sequence[str] = ()) -> str:
        names = [self.loader.name_of(row) for row in rows[:_NAMED]]
        names = [name + remark for name, remark in zip(names, remarks or [""] * len(names), strict=False)]
        rest = [f"{len(rows) - _NAMED} more"] if len(rows) > _NAMED else []
        *first, last = [*names, *rest] or [""]
        return f"{', '.join(first)} and {last}" if first else last


def _fewer(nth: int) -> str:
    return " Of those to come, the 16th is told, the 32nd, and so on." if nth == _ALL_TOLD else ""


def _remedy(fault: Fault, looked: _Looked) -> str:
    if looked.found and not looked.blames_the_model:
        return "Mend or drop these rows."
    bf16 = "" if fault.scale is None else ", or use `mixed_precision='bf16'`, which does not overflow as fp16 does"
    return f"{_CALM}{bf16}."
