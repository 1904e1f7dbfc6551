"""The branches of a check: which sizes of an update, rows and learning rates they compare. Integers; no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import SettingsError
from ...planning.batch_size import rate_factor
from ...planning.shuffle import order_of

_FEWEST = 4  # updates at twice the batch: with fewer, the optimizer's state hardly follows the new size
# A schedule that has decayed to less than this share of its peak leaves no rate at which batches could differ.
_DECAYED = 0.1
# One number for this use of the seed, so that it does not draw the same orders as an epoch.
_BRANCH = 0x61647669


@dataclass(frozen=True)
class Cell:
    """A combination of a batch and a learning rate.

    Attributes:
        ratio: rows of an update / rows of an update of the run.
        scaled: whether the learning rate follows the ratio.
    """

    ratio: float
    scaled: bool


CELLS = (Cell(0.5, True), Cell(0.5, False), Cell(1.0, True), Cell(2.0, True), Cell(2.0, False))


@dataclass(frozen=True)
class Experiment:
    """The branches of a check, which all start from one checkpoint and train on equally many rows.

    Attributes:
        effective_batch_size: rows of an update at ratio 1, an even number.
        rows: rows of each branch.
        learning_rate: the rate of the first parameter group at ratio 1.
        factor: that rate / the peak of the run's schedule.
        rule: how the scaled rate follows the ratio: "sqrt" or "linear".
        seeds: number of orders of the rows.
    """

    effective_batch_size: int
    rows: int
    learning_rate: float
    factor: float
    rule: str
    seeds: int

    def size(self, cell: Cell) -> int:
        """Return the rows of an update."""
        return round(cell.ratio * self.effective_batch_size)

    def updates(self, cell: Cell) -> int:
        """Return the number of updates, which together have `rows` rows."""
        return self.rows // self.size(cell)

    def rate_factor(self, cell: Cell) -> float:
        """Return the factor on the learning rate at ratio 1."""
        return rate_factor(self.rule, cell.ratio) if cell.scaled else 1.0

    @property
    def n_branches(self) -> int:
        return len(CELLS) * self.seeds


def experiment_of(
    effective_batch_size: int, n_rows: int, optimizer: str, *, rate: float, peak: float, share: float, seeds: int
) -> Experiment:
    """Return the experiment for a run.

    Args:
        effective_batch_size: rows of an update of the run. If it is odd, the experiment has one row less.
        n_rows: rows that the whole run trains on; each epoch counts its rows again.
        optimizer: the name of the run's optimizer.
        rate: the learning rate to keep.
        peak: the peak of the run's schedule.
        share: share of `n_rows` that each branch trains on, rounded down to whole updates of all sizes.
        seeds: number of orders of the rows.

    Raises:
        SettingsError: if an update has one row, or the share is too small for a few updates of twice the batch.
    """
    if effective_batch_size < 2:
        raise SettingsError(
            ["`--check` compares half the batch, but an update of this run has 1 row. Train with more rows an update."]
        )
    even = effective_batch_size - effective_batch_size % 2
    unit = 2 * even
    rows, fewest = int(share * n_rows + 1e-9) // unit * unit, _FEWEST * unit
    if rows < fewest:
        enough = math.ceil(100 * fewest / n_rows) / 100
        remedy = (
            f"Give `--share {enough:g}`."
            if enough <= 1
            else f"The whole run has only {n_rows:,} rows: train longer, or compare batches with `ftaccum search`."
        )
        raise SettingsError(
            [
                f"`share` is {share:g}, which is {int(share * n_rows):,} of the run's {n_rows:,} rows, but a branch "
                f"needs at least {fewest:,}: {_FEWEST} updates of {unit:,} rows, twice the batch. {remedy}"
            ]
        )
    return Experiment(even, rows, rate, rate / peak, "linear" if optimizer == "sgd" else "sqrt", seeds)


def steady_rate(history: Sequence[float]) -> tuple[float, bool]:
    """Return the learning rate that branches keep, and whether it is the one of the run's last update.

    It is the mean over the run's updates if the schedule has decayed to a tenth of its largest rate or less, as at the
    end of a run: at a rate near 0, all batches would give the same weights.

    Args:
        history: the rate of each update before the checkpoint; at least one, not all 0.
    """
    is_last = history[-1] > _DECAYED * max(history)
    return (history[-1] if is_last else math.fsum(history) / len(history)), is_last


def scaled_rates(recipe: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return the settings of a Recipe that give learning rates, each multiplied by a factor."""
    head, groups = recipe.get("head_learning_rate"), recipe.get("optimizer_groups")
    return {
        "learning_rate": recipe["learning_rate"] * factor,
        "head_learning_rate": None if head is None else head * factor,
        "optimizer_groups": None
        if groups is None
        else [group | ({"lr": group["lr"] * factor} if "lr" in group else {}) for group in groups],
    }


@dataclass(frozen=True)
class RowOrder:
    """The rows that follow a checkpoint, in the run's own order or in another one.

    Attributes:
        n_rows: training rows.
        epoch: the epoch that continues, from 0.
        done: rows of this epoch that the run has trained on.
        seed: the run's seed.
        rows: rows that a branch trains on.
        n_held: rows that follow after them, which no branch trains on; 0 if the run has validation rows.
    """

    n_rows: int
    epoch: int
    done: int
    seed: int
    rows: int
    n_held: int = 0

    def held(self) -> list[int]:
        """Return the positions of the rows to hold out."""
        first = self.done + self.rows
        return order_of(self.epoch, self.n_rows, self.seed)[first : first + self.n_held]

    def arrangement(self, number: int) -> list[int]:
        """Return, for each position of the training rows, the row to put there.

        The run then trains on the rows of this epoch that it has not had, in another order. The rows that it has had
        change places among themselves, which reorders the next epoch.

        Args:
            number: number of the order, from 0; order 0 is the run's own.
        """
        import numpy as np

        found = np.arange(self.n_rows)
        if number == 0:
            return found.tolist()
        order = np.array(order_of(self.epoch, self.n_rows, self.seed))
        first = self.done + self.rows
        draw = np.random.RandomState((self.seed, _BRANCH, number))
        for places in (order[: self.done], np.delete(order, slice(first, first + self.n_held))[self.done :]):
            found[places] = draw.permutation(places)
        return found.tolist()
