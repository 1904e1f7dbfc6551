"""The figures of a check: means with intervals, the verdict and the table. This module does not load torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .experiment import CELLS, Cell, Experiment

CONFIDENCE = 0.9
_NAMES = {0.5: "half the batch", 1.0: "the run's batch", 2.0: "twice the batch"}
_SIGNS = {0.5: "½", 1.0: "1", 2.0: "2"}


@dataclass(frozen=True)
class Outcome:
    """The outcome of one branch.

    Attributes:
        cell: its batch and learning rate.
        seed: number of the order of its rows, from 1.
        loss: loss on the rows that it was measured on; infinite if it diverged.
        seconds: time it took.
    """

    cell: Cell
    seed: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Interval:
    """The mean of several losses, with the half-width of its interval.

    Attributes:
        half_width: NaN for fewer than two losses, and if a loss is not finite.
    """

    mean: float
    half_width: float

    @property
    def is_known(self) -> bool:
        return math.isfinite(self.half_width)

    def overlaps(self, other: "Interval") -> bool:
        """Return whether the two intervals have a point in common."""
        return abs(self.mean - other.mean) <= self.half_width + other.half_width

    def __str__(self) -> str:
        if math.isinf(self.mean):
            return "diverged"
        return f"{self.mean:.5g}" + (f" ± {self.half_width:.2g}" if self.is_known else "")


def interval_of(losses: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the interval for the mean of losses by Student's t: t · s / √n, with n − 1 degrees of freedom.

    Args:
        losses: at least one.
        confidence: probability that the interval covers the expected loss, if the losses are normally distributed.
    """
    n = len(losses)
    if not all(map(math.isfinite, losses)):
        return Interval(math.inf, math.nan)
    mean = math.fsum(losses) / n
    if n < 2:
        return Interval(mean, math.nan)
    from scipy.stats import t  # slow to import

    deviation = math.sqrt(math.fsum((loss - mean) ** 2 for loss in losses) / (n - 1))
    return Interval(mean, float(t.ppf((1 + confidence) / 2, n - 1)) * deviation / math.sqrt(n))


def intervals_of(outcomes: Sequence[Outcome]) -> dict[Cell, Interval]:
    """Return the interval of each combination that has an outcome.

    Orders of the rows that not all combinations have had, because the check was interrupted, are left out if others
    are complete: their rows would count for some batches only.
    """
    cells = {seed: {one.cell for one in outcomes if one.seed == seed} for seed in {one.seed for one in outcomes}}
    used = {seed for seed, found in cells.items() if len(found) == len(CELLS)} or cells.keys()
    by_cell = {cell: [one.loss for one in outcomes if one.cell == cell and one.seed in used] for cell in CELLS}
    return {cell: interval_of(losses) for cell, losses in by_cell.items() if losses}


def verdict(found: Mapping[Cell, Interval], experiment: Experiment, measure: str) -> str:
    """Return sentences on which batch reached the lowest loss, or why there is no verdict.

    There is one only if the lowest interval overlaps none of the other batches'.
    """
    finite = {cell: interval for cell, interval in found.items() if math.isfinite(interval.mean)}
    if not all(cell in found for cell in CELLS) or any(not interval.is_known for interval in finite.values()):
        return "No verdict: the check has not trained each branch with two orders of the rows."
    if not finite:
        return "No verdict: all branches diverged. The run's learning rate is too high at this checkpoint."
    best = min(finite, key=lambda cell: finite[cell].mean)
    near = sorted({c.ratio for c in finite if c.ratio != best.ratio and finite[best].overlaps(finite[c])})
    size = experiment.size(best)
    if near:
        others = " and ".join(f"{experiment.size(Cell(ratio, scaled=True)):,}" for ratio in near)
        return (
            f"No verdict: the {CONFIDENCE:.0%} interval of updates of {size:,} rows overlaps those of {others} rows. "
            f"After the same {experiment.rows:,} rows, their losses differ less than those of other row orders. "
            "More `--seeds` or a larger `--share` measure smaller differences. Otherwise choose the batch by time and "
            "memory."
        )
    rate = "" if best.ratio == 1 else f" with the {_column(best)} learning rate"
    return (
        f"{_NAMES[best.ratio].capitalize()} ({size:,} rows){rate} reached the lowest {measure} after the same "
        f"{experiment.rows:,} rows, {finite[best]}. {_meaning(best.ratio, experiment)}"
    )


def _meaning(ratio: float, experiment: Experiment) -> str:
    if ratio == 2:
        return (
            "A larger batch helps here: it takes half as many updates, and on several devices less time. Train with "
            f"`effective_batch_size={2 * experiment.effective_batch_size}`."
        )
    if ratio == 1:
        return "Keep it: both a smaller and a larger batch learn less from the same rows."
    return (
        "A smaller batch learns more from the same rows here, and on one device it takes about as many passes. Train "
        "with "
        f"`effective_batch_size={experiment.effective_batch_size // 2}`."
    )


def table(found: Mapping[Cell, Interval], experiment: Experiment, measure: str) -> str:
    """Return the table of all combinations that have an outcome."""
    heads = ["batch", "rows per update", "updates", "learning rate", f"{measure} ({CONFIDENCE:.0%} interval)"]
    lines = [
        [
            f"× {_SIGNS[cell.ratio]}",
            f"{experiment.size(cell):,}",
            f"{experiment.updates(cell):,}",
            f"{experiment.learning_rate * experiment.rate_factor(cell):.3g} {_column(cell)}".rstrip(),
            str(interval),
        ]
        for cell, interval in found.items()
    ]
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    rows = ["  ".join(w.ljust(n) for w, n in zip(line, widths, strict=True)).rstrip() for line in [heads, *lines]]
    return "\n".join(rows)


def _column(cell: Cell) -> str:
    if cell.ratio == 1:
        return ""
    return "scaled" if cell.scaled else "unchanged"


def as_json(experiment: Experiment, outcomes: Sequence[Outcome], measure: str, described: str) -> dict[str, Any]:
    """Return all figures as JSON has them, with null for the loss of a branch that diverged."""
    found = intervals_of(outcomes)

    def named(cell: Cell) -> dict[str, Any]:
        rate = experiment.learning_rate * experiment.rate_factor(cell)
        sizes = {"effective_batch_size": experiment.size(cell), "updates": experiment.updates(cell)}
        return {"ratio": cell.ratio, "scaled": cell.scaled, **sizes, "learning_rate": rate}

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "rows": experiment.rows,
        "measure": measure,
        "rule": experiment.rule,
        "confidence": CONFIDENCE,
        "branches": [
            named(one.cell) | {"seed": one.seed, "loss": number(one.loss), "seconds": one.seconds} for one in outcomes
        ],
        "intervals": [
            named(cell) | {"mean": number(interval.mean), "half_width": number(interval.half_width)}
            for cell, interval in found.items()
        ],
        "verdict": described,
    }
