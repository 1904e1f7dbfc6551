"""Accumulate windows in many ways, and compare each with the same rows in one batch."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import transformers
from accelerate.utils import gather_object

from ...accumulation.accumulator import GradientAccumulator
from ...planning.micro_batches import MicroBatchPlanner, RowIndices
from ...runtime.model_context import unwrap_on_exit
from .bench import Bench
from .gradients import WindowGradient
from .peers import divided_by_k, why_not_trainer, with_trainer
from .precision import shown
from .report import SplitResult
from .splits import Split, splits_of

_TOO_SMALL = "(the model cannot run on a single row)"
_NOT_FINITE = "(the loss of these rows is not finite in one batch)"
_TRAINER = f"Trainer, transformers {transformers.__version__}"


@dataclass(frozen=True)
class Compared:
    """The results of a comparison. `Verification` describes the attributes."""

    splits: list[SplitResult]
    others: list[SplitResult]
    floor: float
    tolerance: float


@dataclass(frozen=True)
class Comparison:
    """A comparison of many ways to split a window with one batch.

    Attributes:
        bench: the model, its rows and their full window.
        planner: the planner of training.
        unit: number of rows of a micro-batch, summed over all processes.
        n_random: number of splits into random orders and sizes.
        tolerance: returns the largest error that counts as rounding, given the error that rounding alone causes.
    """

    bench: Bench
    planner: MicroBatchPlanner
    unit: int
    n_random: int
    tolerance: Callable[[float], float]

    def windows(self) -> dict[RowIndices, list[Split]]:
        """Return the splits of each window, by the window's rows."""
        bench, found = self.bench, dict[RowIndices, list[Split]]()
        for split in splits_of(
            bench.window, bench.run.data.train.cut, self.planner, self.unit, self.n_random, bench.seed[0]
        ):
            if not split.at_one_width or bench.is_wider(split):
                found.setdefault(split.rows, []).append(split)
        return found

    def results(self, on_window: Callable[[], object]) -> Compared:
        """Measure all splits. Afterwards the model has no wrappers.

        Args:
            on_window: called after each window.
        """
        bench, windows = self.bench, self.windows()
        measured, floor = list[SplitResult](), 0.0
        with self._accumulators() as new_accumulator:
            bench.settle_scale()
            for rows, splits in windows.items():
                of_window, floor_of_window = self._of_window(rows, splits, new_accumulator)
                measured += of_window
                floor = max(floor, floor_of_window)
                on_window()
            whole = bench.together(bench.window)
            short = max((rows for rows in windows if rows != bench.window), key=len, default=())
            others = list(self._divided_by_k(whole, short))
        tolerance = self.tolerance(floor)
        judged = [_judged(each, tolerance) for each in measured]
        return Compared(judged, [*others, self._trainer(whole)], floor, tolerance)

    @contextmanager
    def _accumulators(self) -> Iterator[Callable[[], GradientAccumulator]]:
        """Wrap the model as in training, and yield a function that returns new accumulators for it."""
        run = self.bench.run
        with unwrap_on_exit(run.model):
            wrapped, _ = run.prepared
            yield lambda: run.new_accumulator(wrapped)

    def _of_window(
        self, rows: RowIndices, splits: Sequence[Split], new_accumulator: Callable[[], GradientAccumulator]
    ) -> tuple[list[SplitResult], float]:
        """Return the errors of a window's splits, mostly without verdicts, and the error that rounding alone causes."""
        bench = self.bench
        if not any(map(bench.takes, splits)):
            return [SplitResult(*split.summary, exact=False, note=_TOO_SMALL) for split in splits], 0.0
        wanted = bench.together(rows)
        if bench.whole(rows).is_dummy and not wanted.is_an_update:
            return [
                SplitResult(*split.summary, exact=True, note="(no row counts in the loss: no update)")
                for split in splits
            ], 0.0
        again = bench.together(rows, backwards=True, factor=1 / 3).error(wanted)
        return [self._accumulated(split, wanted, new_accumulator) for split in splits], max(gather_object([again]))

    def _accumulated(
        self, split: Split, wanted: WindowGradient, new_accumulator: Callable[[], GradientAccumulator]
    ) -> SplitResult:
        if not self.bench.takes(split):
            return SplitResult(*split.summary, exact=False, note=_TOO_SMALL)
        found = self.bench.accumulated(new_accumulator(), split)
        if self.bench.reference.over_window and not math.isfinite(wanted.loss):
            # Such a loss may be undefined for few rows, and the accumulated one must be so too.
            undefined = self.bench.run.process_group.any(not math.isfinite(found.loss))
            return SplitResult(*split.summary, exact=undefined, note=_NOT_FINITE)
        return SplitResult(*split.summary, *_errors(found, wanted))

    def _divided_by_k(self, whole: WindowGradient, short: RowIndices) -> Iterator[SplitResult]:
        """Yield the errors of `loss / k` for the full window, and for a short one if there is one.

        The short window is divided by the k of the full one.
        """
        full = self._in_order("loss / k", self.bench.window)
        remainder = [self._in_order(f"loss / k, remainder of {len(short)}", short)] if short else []
        k = len(full.slices)
        for split in [full, *remainder]:
            if not self.bench.takes(split):
                yield SplitResult(*split.summary, note=_TOO_SMALL)
                continue
            wanted = whole if split is full else self.bench.together(split.rows)
            if wanted.is_an_update:
                yield SplitResult(*split.summary, *_errors(divided_by_k(self.bench, split, k), wanted))

    def _trainer(self, whole: WindowGradient) -> SplitResult:
        split = self._in_order(_TRAINER, self.bench.window)
        reason = why_not_trainer(self.bench) if self.bench.takes(split) else _TOO_SMALL
        if reason is not None:
            return SplitResult(*split.summary, note=reason)
        try:
            with unwrap_on_exit(self.bench.run.model):
                found = with_trainer(self.bench, split)
        except Exception as error:  # Trainer may raise anything for a model that it does not support
            self.bench.taken()
            return SplitResult(*split.summary, note=f"({shown(error)})")
        return SplitResult(*split.summary, *_errors(found, whole))

    def _in_order(self, name: str, rows: RowIndices) -> Split:
        """Return a split into equal slices, in the order of arrival."""
        return Split(name, rows, self.bench.run.data.train.cut(rows, replace(self.planner, costs=None)))


def _judged(measured: SplitResult, tolerance: float) -> SplitResult:
    if measured.exact is not None:
        return measured
    errors = (measured.gradient_error, measured.loss_error)
    return replace(measured, exact=all(error is not None and error <= tolerance for error in errors))


def _errors(found: WindowGradient, wanted: WindowGradient) -> tuple[float | None, float | None]:
    """Return the errors of gradient and loss, the largest of any process; None for an error that is not finite."""
    everywhere = gather_object([(found.gradient_error(wanted), found.loss_error(wanted))])
    of_gradient, of_loss = zip(*everywhere, strict=True)
    return _largest(of_gradient), _largest(of_loss)


def _largest(errors: Sequence[float]) -> float | None:
    return max(errors) if all(map(math.isfinite, errors)) else None
