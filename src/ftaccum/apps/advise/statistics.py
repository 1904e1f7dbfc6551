"""The statistics of a check: intervals of losses and of their differences, the verdict and the table. No torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...insight.student_t import t_quantile
from .experiment import CELLS, Cell, Experiment

CONFIDENCE = 0.9  # probability that an interval covers the expected loss, if losses are normally distributed
_NAMES = {0.5: "half the batch", 1.0: "the run's batch", 2.0: "twice the batch"}
_SIGNS = {0.5: "½", 1.0: "1", 2.0: "2"}
_NO_VERDICT = "No verdict:"
_STILL_LEARNING = (
    f"{_NO_VERDICT} the run is still learning at this rate. The mean loss falls with every increase of learning rate × "
    "updates, so the check shows more progress with more or larger steps, not which batch is better. Train longer, or "
    "compare whole runs with `ftaccum search`."
)


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
    """The mean of several numbers, with the half-width of its interval.

    Attributes:
        half_width: NaN for fewer than two numbers, and if one is not finite.
    """

    mean: float
    half_width: float

    @property
    def is_known(self) -> bool:
        return math.isfinite(self.half_width)

    @property
    def is_positive(self) -> bool:
        """Whether all of the interval is above 0."""
        return self.mean > self.half_width

    def overlaps(self, other: "Interval") -> bool:
        """Return whether the two intervals have a point in common."""
        return abs(self.mean - other.mean) <= self.half_width + other.half_width

    def __str__(self) -> str:
        if math.isinf(self.mean):
            return "diverged"
        return f"{self.mean:.5g}" + (f" ± {self.half_width:.2g}" if self.is_known else "")


def interval_of(losses: Sequence[float]) -> Interval:
    """Return the 90% interval for the mean of losses by Student's t: t · s / √n, with n − 1 degrees of freedom.

    Args:
        losses: at least one loss, or difference of losses.
    """
    n = len(losses)
    if not all(map(math.isfinite, losses)):
        return Interval(math.inf, math.nan)
    mean = math.fsum(losses) / n
    if n < 2:
        return Interval(mean, math.nan)
    deviation = math.sqrt(math.fsum((loss - mean) ** 2 for loss in losses) / (n - 1))
    return Interval(mean, t_quantile((1 + CONFIDENCE) / 2, n - 1) * deviation / math.sqrt(n))


def intervals_of(outcomes: Sequence[Outcome]) -> dict[Cell, Interval]:
    """Return the interval of each combination that has an outcome in the comparable orders."""
    by_cell: dict[Cell, list[float]] = {}
    for one in _comparable(outcomes):
        by_cell.setdefault(one.cell, []).append(one.loss)
    return {cell: interval_of(by_cell[cell]) for cell in CELLS if cell in by_cell}


def _comparable(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes without the orders of the rows that not all combinations have had, if others are complete.

    An interrupted check has such an order, whose rows would count for some batches only.
    """
    cells = {seed: {one.cell for one in outcomes if one.seed == seed} for seed in {one.seed for one in outcomes}}
    used = {seed for seed, found in cells.items() if len(found) == len(CELLS)} or cells.keys()
    return [one for one in outcomes if one.seed in used]


def differences_of(outcomes: Sequence[Outcome]) -> dict[Cell, Interval]:
    """Return how much higher the loss of each other batch is than the lowest one, at the better of its learning rates.

    All batches train on the same rows in an order. So the interval is that of the differences within the orders, which
    is narrower than those of the losses if orders differ more than batches.
    """
    means = {cell: interval.mean for cell, interval in intervals_of(outcomes).items() if math.isfinite(interval.mean)}
    if not means:
        return {}
    best = min(means, key=lambda cell: means[cell])
    others = {cell.ratio for cell in means} - {best.ratio}
    rivals = [min((c for c in means if c.ratio == ratio), key=lambda cell: means[cell]) for ratio in sorted(others)]
    loss = {(one.cell, one.seed): one.loss for one in _comparable(outcomes)}
    orders = [seed for cell, seed in loss if cell == best]
    pairs = {c: [loss[c, seed] - loss[best, seed] for seed in orders if (c, seed) in loss] for c in rivals}
    return {cell: interval_of(differences) for cell, differences in pairs.items() if differences}


def is_still_learning(means: Mapping[Cell, float], experiment: Experiment) -> bool:
    """Return whether every increase of learning rate × updates lowers the mean loss, over all combinations.

    Half the batch has twice the updates. So its lower loss may come from the longer way alone, as where a check raises
    a rate that has decayed to about 0.
    """
    if any(not math.isfinite(means.get(cell, math.inf)) for cell in CELLS):
        return False
    way = {cell: experiment.rate_factor(cell) * experiment.updates(cell) for cell in CELLS}
    longer = [(a, b) for a in CELLS for b in CELLS if way[a] > way[b] * (1 + 1e-6)]
    return all(means[a] < means[b] for a, b in longer)


def verdict(outcomes: Sequence[Outcome], experiment: Experiment, measure: str, n_measured: int) -> str:
    """Return sentences on which batch reached the lowest loss, or why there is no verdict.

    There is a verdict if the lowest interval overlaps none of the other batches'. If it overlaps some, there is a
    preference if the differences to these batches within the orders have intervals that exclude 0. There is neither if
    `is_still_learning`.

    Args:
        outcomes: the outcomes of the branches.
        experiment: what the branches compare.
        measure: the name of the loss.
        n_measured: number of rows that it is measured on.
    """
    conclusion = _conclusion(outcomes, experiment, measure)
    if conclusion.startswith(_NO_VERDICT):
        return conclusion
    if is_still_learning({cell: found.mean for cell, found in intervals_of(outcomes).items()}, experiment):
        conclusion = _STILL_LEARNING
    measured = rows_of(n_measured)
    return (
        f"{conclusion} Losses are measured on {measured}: the intervals cover the order of the training rows only, and "
        f"not the choice of the {measured}."
    )


def _conclusion(outcomes: Sequence[Outcome], experiment: Experiment, measure: str) -> str:
    """Return the verdict of the losses alone."""
    found = intervals_of(outcomes)
    finite = {cell: interval for cell, interval in found.items() if math.isfinite(interval.mean)}
    if not all(cell in found for cell in CELLS) or any(not interval.is_known for interval in finite.values()):
        return f"{_NO_VERDICT} the check has not trained each branch with two orders of the rows."
    if not finite:
        return f"{_NO_VERDICT} all branches diverged. The run's learning rate is too high at this checkpoint."
    best = min(finite, key=lambda cell: finite[cell].mean)
    near = {c.ratio for c in finite if c.ratio != best.ratio and finite[best].overlaps(finite[c])}
    size, rows = rows_of(experiment.size(best)), f"the same {experiment.rows:,} rows"
    rate = "" if best.ratio == 1 else f" with the {_column(best)} learning rate"
    if not near:
        return (
            f"{_NAMES[best.ratio].capitalize()} ({size}){rate} reached the lowest {measure} after {rows}, "
            f"{finite[best]}. {_meaning(best.ratio, experiment)}"
        )
    close = {cell: found for cell, found in differences_of(outcomes).items() if cell.ratio in near}
    if all(difference.is_positive for difference in close.values()):
        lower = " and ".join(f"{found} than those of {rows_of(experiment.size(cell))}" for cell, found in close.items())
        return (
            "The intervals overlap, because row orders differ more than batches. Order by order, the losses of updates "
            f"of {size}{rate} were lower by {lower}. {_meaning(best.ratio, experiment)}"
        )
    others = " and ".join(rows_of(experiment.size(cell)) for cell in close)
    return (
        f"{_NO_VERDICT} the {CONFIDENCE:.0%} interval of updates of {size} overlaps those of {others}, and the "
        f"differences within each order of the rows do not exclude 0. More `--seeds` or a larger `--share` measure "
        "smaller differences. Otherwise choose the batch by time and memory."
    )


def rows_of(n_rows: int) -> str:
    """Return a number of rows, such as "1 row"."""
    return f"{n_rows:,} row" + ("" if n_rows == 1 else "s")


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


def as_json(
    experiment: Experiment, outcomes: Sequence[Outcome], measure: str, n_measured: int, described: str
) -> dict[str, Any]:
    """Return all statistics as JSON has them, with null for the loss of a branch that diverged."""

    def named(cell: Cell) -> dict[str, Any]:
        rate = experiment.learning_rate * experiment.rate_factor(cell)
        sizes = {"effective_batch_size": experiment.size(cell), "updates": experiment.updates(cell)}
        return {"ratio": cell.ratio, "scaled": cell.scaled, **sizes, "learning_rate": rate}

    def with_intervals(found: Mapping[Cell, Interval]) -> list[dict[str, Any]]:
        return [
            named(cell) | {"mean": number(interval.mean), "half_width": number(interval.half_width)}
            for cell, interval in found.items()
        ]

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "rows": experiment.rows,
        "measure": measure,
        "measured_rows": n_measured,
        "rule": experiment.rule,
        "confidence": CONFIDENCE,
        "branches": [
            named(one.cell) | {"seed": one.seed, "loss": number(one.loss), "seconds": one.seconds} for one in outcomes
        ],
        "intervals": with_intervals(intervals_of(outcomes)),
        "differences": with_intervals(differences_of(outcomes)),
        "verdict": described,
    }
