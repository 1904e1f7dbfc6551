"""The definition of a search."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...tracking.selection import Criterion
from .settings import SearchSettings
from .space import Space


@dataclass(frozen=True)
class Search:
    """The definition of a search, without the study that records its trials.

    Attributes:
        model_factory: returns a new model for a trial.
        fixed: the arguments of `test_fine_tuning` that all trials share, without the model.
        space: the arguments that vary.
        settings: the settings of the search.
        folder: folder for the trials and reports; None if nothing is to be written.
        progress: whether to show progress bars and a line per trial.
    """

    model_factory: Callable[[], Any]
    fixed: Mapping[str, Any]
    space: Space
    settings: SearchSettings
    folder: Path | None
    progress: bool

    @property
    def is_quiet(self) -> bool:
        """Whether the search prints nothing but warnings."""
        return self.fixed["verbosity"] == "quiet"

    def batch_size(self, n_processes: int) -> int:
        """Return the number of rows of an update at k = 1."""
        return self.fixed["batch_size"] * n_processes

    @property
    def criterion(self) -> Criterion:
        """The criterion by which evaluations and trials are compared."""
        return Criterion.of_settings(self.fixed["metric_for_best"], self.fixed["greater_is_better"])
