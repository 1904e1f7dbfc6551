"""Recovery from running out of memory: the window runs again in smaller micro-batches, for the same update."""

from dataclasses import replace
from typing import Any

from ..data.prefetch import LocalWindow, WindowLoader
from ..planning.micro_batches import MicroBatchRows
from ..runtime.log import logger
from ..runtime.memory import AgreedOutOfMemoryError, FailedPass, MemoryLimits
from ..runtime.process_group import ProcessGroup


class OomRecovery:
    """Adapts the limits of a window loader's micro-batches to the available memory, equally on all processes.

    Attributes:
        limits: the current limits of a micro-batch, and the requested ones.
    """

    def __init__(self, window_loader: WindowLoader, process_group: ProcessGroup) -> None:
        self._window_loader, self._process_group = window_loader, process_group
        self.limits = MemoryLimits(window_loader.planner.limits)

    def split(self, local_window: LocalWindow, failed: FailedPass | None) -> LocalWindow:
        """Return the same window in smaller micro-batches.

        Args:
            local_window: this process's part of the window.
            failed: this process's pass that ran out of memory; None if it was a pass of another process.

        Raises:
            torch.OutOfMemoryError: on all processes, if memory ran out for a single row.
        """
        piece = MicroBatchRows() if failed is None else local_window.micro_batches[failed.index].slice
        if self._process_group.any(failed is not None and len(piece.rows) < 2):
            raise AgreedOutOfMemoryError(
                "Memory ran out in a micro-batch of a single row"
                + (f" ({self._window_loader.loader.name_of(piece.rows[0])})" if piece.rows else "")
                + ". Truncate the rows, set `gradient_checkpointing`, or use a smaller model. All earlier updates are "
                "complete." + (f" The device reported: {failed.message}" if failed is not None else "")
            )
        tokens = self._process_group.min(None if failed is None else piece.tokens)
        assert tokens is not None, "memory ran out on at least one process"
        self.limits.record_failure(tokens)
        self._apply_limits()
        smaller = self._window_loader.again(local_window)
        logger.warning(
            f"Out of memory: update {local_window.window.index + 1} is run again with the same rows, in "
            f"{len(smaller.micro_batches)} micro-batches instead of {len(local_window.micro_batches)}."
        )
        return smaller

    def window_done(self) -> None:
        """Allow larger micro-batches again after enough windows that fit in memory."""
        self.limits.record_success()
        self._apply_limits()

    def state_dict(self) -> dict[str, Any]:
        return self.limits.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.limits.load_state_dict(state_dict)
        self._apply_limits()

    def _apply_limits(self) -> None:
        self._window_loader.planner = replace(self._window_loader.planner, limits=self.limits.current)
