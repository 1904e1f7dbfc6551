"""What defines a search."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .settings import SearchSettings
from .space import Space


@dataclass(frozen=True)
class Search:
    """A search, without its study.

    Attributes:
        model_factory: returns a new model for a trial.
        fixed: the arguments that all trials share: those of `test_fine_tuning` without the model.
        space: what the search varies.
        settings: how it proceeds.
        folder: folder for trials and reports, if any.
        progress: whether to show bars, and a line per trial.
    """

    model_factory: Callable[[], Any]
    fixed: Mapping[str, Any]
    space: Space
    settings: SearchSettings
    folder: Path | None
    progress: bool

    def batch_size(self, n_processes: int) -> int:
        """Return the rows of an update at k = 1."""
        return self.fixed["batch_size"] * n_processes
