"""Running means of the training loss over several updates."""

from collections.abc import Mapping
from typing import Any

import torch

from ..objective.normalizer import WeightedMeans


class RunningLoss:
    """The mean over the loss items of all updates since it was last taken."""

    def __init__(self) -> None:
        self._losses: WeightedMeans | None = None

    def add(self, losses: WeightedMeans) -> None:
        """Add the losses of an update, on the host and over all processes."""
        if self._losses is None:
            self._losses = WeightedMeans(losses.terms, losses.sums_T.device)
        self._losses.merge(losses)

    @property
    def is_empty(self) -> bool:
        """Whether no update was added."""
        return self._losses is None

    def mean(self) -> float:
        """Return the mean: the sum of the means of all terms. NaN if no update was added."""
        return float("nan") if self._losses is None else self._losses.total()

    def terms(self) -> dict[str, float]:
        """Return the mean of each term if the loss has several; an empty dict otherwise."""
        terms = {} if self._losses is None else self._losses.read()
        return terms if len(terms) > 1 else {}

    def take(self) -> float:
        """Return the mean, and start again."""
        mean, self._losses = self.mean(), None
        return mean

    def state_dict(self) -> dict[str, Any] | None:
        found = self._losses
        if found is None:
            return None
        return {"terms": found.terms, "sums": found.sums_T.tolist(), "items": found.items_T.tolist()}

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        if saved is None:
            self._losses = None
            return
        self._losses = WeightedMeans(saved["terms"], torch.device("cpu"))
        self._losses.sums_T = torch.tensor(saved["sums"], dtype=self._losses.sums_T.dtype)
        self._losses.items_T = torch.tensor(saved["items"], dtype=self._losses.items_T.dtype)
