"""The updates between two entries for the trackers, summed up."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..objective.normalizer import WeightedMeans
from .ledger import WindowEntry
from .running_loss import RunningLoss


class LogPeriod:
    """The updates since the last entry for the trackers.

    Attributes:
        n_updates: number of updates, skipped ones included.
    """

    def __init__(self) -> None:
        self.n_updates = 0
        self._loss = RunningLoss()
        self._n_skipped = 0
        self._norm = self._largest_norm = self._rate = math.nan
        self._rows = self._tokens = self._positions = self._peak_memory = 0
        self._seconds = 0.0

    def add(self, entry: WindowEntry, losses: WeightedMeans) -> None:
        """Add an update.

        Args:
            losses: the losses of its window, over all processes.
        """
        self.n_updates += 1
        self._norm, self._rate = entry.grad_norm, entry.learning_rate
        self._rows += entry.rows
        self._tokens += entry.tokens
        self._positions += entry.positions
        self._peak_memory = max(self._peak_memory, entry.peak_memory)
        self._seconds += entry.seconds
        if entry.skipped:
            self._n_skipped += 1
        else:
            self._loss.add(losses)
            self._largest_norm = float(np.fmax(self._largest_norm, entry.grad_norm))  # ignores the first NaN

    def values(self) -> dict[str, float]:
        """Return the values to log, by name.

        `loss` (and `terms/…`, if the loss has several terms) is the mean over the loss items of all updates that were
        not skipped, and `grad_norm_max` is the largest of their norms. `grad_norm` and `learning_rate` are those of the
        last update, and `skipped` is the number of skipped updates.
        """
        return {
            "loss": self._loss.mean(),
            "grad_norm": self._norm,
            "grad_norm_max": self._largest_norm,
            "learning_rate": self._rate,
            "skipped": self._n_skipped,
        } | {f"terms/{term}": value for term, value in self._loss.terms().items()}

    def work(self) -> dict[str, float]:
        """Return the speed of the updates, the share of padding in them, and the peak memory so far, by name.

        Padding and tokens are left out if the rows have no tokens.
        """
        speed = 1 / self._seconds if self._seconds > 0 else math.nan
        found = {"rows_per_second": self._rows * speed, "peak_memory_gb": self._peak_memory / 1e9}
        if self._positions:
            found["tokens_per_second"] = self._tokens * speed
            found["padding"] = 1 - self._tokens / self._positions
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "n_updates": self.n_updates,
            "n_skipped": self._n_skipped,
            "norm": self._norm,
            "largest_norm": self._largest_norm,
            "rate": self._rate,
            "loss": self._loss.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.n_updates, self._n_skipped = saved["n_updates"], saved["n_skipped"]
        self._norm, self._largest_norm, self._rate = saved["norm"], saved["largest_norm"], saved["rate"]
        self._loss.load_state_dict(saved["loss"])
