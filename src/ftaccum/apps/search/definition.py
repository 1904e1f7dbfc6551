"""What a search is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .settings import SearchSettings
from .space import Space


@dataclass(frozen=True)
class Search:
    """What a search is, apart from its study.

    Attributes:
        fixed: the arguments that all trials share: those of `test_fine_tuning` but for the model.
        folder: where trials and reports go, if anywhere.
        progress: whether to show bars, and a line a trial.
    """

    model_factory: Callable[[], Any]
    fixed: Mapping[str, Any]
    space: Space
    settings: SearchSettings
    folder: Path | None
    progress: bool

    def batch_size(self, n_processes: int) -> int:
        """Rows of an update at k = 1."""
        return self.fixed["batch_size"] * n_processes
