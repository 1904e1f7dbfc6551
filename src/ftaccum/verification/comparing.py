"""Windows accumulated in many ways, each held against the same rows in one batch."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import transformers
from accelerate.utils import gather_object

from ..borrowing import unwrapped_afterwards
from ..calibration import NoCalibration
from ..cutting import Cutter, Rows
from ..loop import TrainingLoop
from ..memory import Agreement
from ..optim import make_optimizer, make_schedule
from ..wide_gradients import PlainGradients
from .bench import Bench
from .gradients import Found
from .peers import divided_by_k, why_not_trainer, with_trainer
from .precision import said
from .report import Measured
from .splits import Split, splits_of

_TOO_SMALL = "(the model takes no row by itself)"
_TRAINER = f"Trainer, transformers {transformers.__version__}"


@dataclass(frozen=True)
class Compared:
    """For the attributes see `Verification`."""

    splits: list[Measured]
    others: list[Measured]
    floor: float
    tolerance: float


@dataclass(frozen=True)
class Comparison:
    """What is compared, and by which measure.

    Attributes:
        cutter: that of training.
        unit: rows that all processes take in at a time.
        n_random: cuts into random orders and sizes.
        tolerance: from what rounding alone does, what counts as rounding.
    """

    bench: Bench
    agreement: Agreement
    cutter: Cutter
    unit: int
    n_random: int
    tolerance: Callable[[float], float]

    def splits(self) -> list[Split]:
        """What is tried."""
        bench = self.bench
        every = splits_of(bench.window, bench.train.cut, self.cutter, self.unit, self.n_random, bench.seed[0])
        return [split for split in every if not split.at_one_width or bench.is_wider(split)]

    def results(self, on_split: Callable[[], object]) -> Compared:
        """Measures. The model is left without wrappers.

        Args:
            on_split: called after each of them.
        """
        bench, splits, measured = self.bench, self.splits(), []
        with self._loops() as new_loop:
            bench.settle_scale()
            whole = bench.together(bench.window)
            floor = self._floor(whole)
            tolerance = self.tolerance(floor)
            for split in splits:
                measured.append(self._accumulated(split, whole, tolerance, new_loop()))
                on_split()
            others = list(self._divided_by_k(whole, splits))
        return Compared(measured, [*others, self._trainer(whole)], floor, tolerance)

    @contextmanager
    def _loops(self) -> Iterator[Callable[[], TrainingLoop]]:
        """Makes loops, on a model that is prepared as in training, for an optimizer that never steps."""
        accelerator, model, objective = self.bench.accelerator, self.bench.model, self.bench.objective
        optimizer = make_optimizer(model, torch.optim.SGD, learning_rate=1.0, weight_decay=0.0)
        schedule = make_schedule("constant", optimizer, 0, 1)
        with unwrapped_afterwards(model):
            gradients = PlainGradients(optimizer)
            wrapped, prepared = gradients.prepare(accelerator, model)
            yield lambda: TrainingLoop(
                accelerator, wrapped, objective, prepared, schedule, gradients, lambda _: 1.0,
                max_grad_norm=math.inf, agreement=self.agreement, calibration=NoCalibration(),
            )  # fmt: skip

    def _floor(self, whole: Found) -> float:
        """What rounding alone does: the rows in other orders, the loss times a third."""
        window = self.bench.window
        shuffled = tuple(window[n] for n in np.random.RandomState(self.bench.seed).permutation(len(window)))
        again = [self.bench.together(window, order, 1 / 3).error(whole) for order in (window[::-1], shuffled)]
        return max(gather_object(again))

    def _accumulated(self, split: Split, whole: Found, tolerance: float, loop: TrainingLoop) -> Measured:
        if not self.bench.takes(split):
            return Measured(*split.facts, exact=False, note=_TOO_SMALL)
        if self.bench.whole(split.rows).is_ghost:
            return Measured(*split.facts, exact=True, note="(no loss items: no update)")
        errors = _errors(self.bench.accumulated(loop, split), self._wanted(split, whole))
        return Measured(*split.facts, *errors, exact=all(error is not None and error <= tolerance for error in errors))

    def _divided_by_k(self, whole: Found, splits: Sequence[Split]) -> Iterator[Measured]:
        """Of the full window, and of the longest that is short: k is still that of the full one there."""
        full = self._in_order("loss / k", self.bench.window)
        short = max((split.rows for split in splits if len(split.rows) < len(full.rows)), key=len, default=None)
        remainder = [] if short is None else [self._in_order(f"loss / k, remainder of {len(short)}", short)]
        k = len(full.slices)
        for split in [full, *remainder]:
            if not self.bench.takes(split):
                yield Measured(*split.facts, note=_TOO_SMALL)
            else:
                errors = _errors(divided_by_k(self.bench, split, k), self._wanted(split, whole))
                yield Measured(*split.facts, *errors)

    def _trainer(self, whole: Found) -> Measured:
        split = self._in_order(_TRAINER, self.bench.window)
        reason = why_not_trainer(self.bench) if self.bench.takes(split) else _TOO_SMALL
        if reason is not None:
            return Measured(*split.facts, note=reason)
        try:
            with unwrapped_afterwards(self.bench.model):
                found = with_trainer(self.bench, split)
        except Exception as error:  # whatever it says of a model that it was not made for
            self.bench.model.zero_grad(set_to_none=True)
            return Measured(*split.facts, note=f"({said(error)})")
        return Measured(*split.facts, *_errors(found, whole))

    def _wanted(self, split: Split, whole: Found) -> Found:
        return whole if split.rows == self.bench.window else self.bench.together(split.rows)

    def _in_order(self, name: str, rows: Rows) -> Split:
        """Equal slices in the order of arrival."""
        return Split(name, rows, self.bench.train.cut(rows, replace(self.cutter, costs=None)))


def _errors(found: Found, wanted: Found) -> tuple[float | None, float | None]:
    """Of gradient and loss, the largest of any process; None for what is no number."""
    everywhere = gather_object([(found.gradient_error(wanted), found.loss_error(wanted))])
    of_gradient, of_loss = zip(*everywhere, strict=True)
    return _largest(of_gradient), _largest(of_loss)


def _largest(errors: Sequence[float]) -> float | None:
    return max(errors) if all(map(math.isfinite, errors)) else None
