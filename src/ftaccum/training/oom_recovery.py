"""What a run learns of its machine, and how the cut of its windows follows: memory that ran out, the cost of a pass."""

from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from ..data.prefetch import LocalWindow, WindowLoader
from ..planning.micro_batches import CostModel, MicroBatchRows
from ..runtime.memory import AgreedOutOfMemoryError, FailedPass, MemoryLimits
from ..runtime.process_group import ProcessGroup
from .pass_costs import MEASURED_WINDOWS, PassTimer


@dataclass
class OomRecovery:
    """Keeps a feed's cutter up to date. All processes come to the same cutter.

    Attributes:
        tell: shows a sentence to the user.
    """

    window_loader: WindowLoader
    process_group: ProcessGroup
    calibration: PassTimer
    tell: Callable[[str], None]
    memory_limits: MemoryLimits = field(init=False)

    def __post_init__(self) -> None:
        self.memory_limits = MemoryLimits(self.window_loader.planner.limits)

    def smaller(self, local_window: LocalWindow, failed: FailedPass | None) -> LocalWindow:
        """The same window in smaller micro-batches.

        Args:
            failed: this process's pass that ran out of memory; None where it was another process's.

        Raises:
            torch.OutOfMemoryError: on all processes, where a single row was too much.
        """
        piece = MicroBatchRows() if failed is None else local_window.micro_batches[failed.index].slice
        if self.process_group.any(failed is not None and len(piece.rows) < 2):
            raise AgreedOutOfMemoryError(
                "Memory ran out in a micro-batch of a single row"
                + (f" ({self.window_loader.loader.name_of(piece.rows[0])})" if piece.rows else "")
                + ". Truncate the rows, use `gradient_checkpointing`, or a smaller model; every update before this one "
                "was taken." + (f" The device said: {failed.said}" if failed is not None else "")
            )
        tokens = self.process_group.min(None if failed is None else piece.tokens)
        assert tokens is not None, "memory ran out on one process at least"
        self.memory_limits.ran_out(tokens)
        self._cut_by_headroom()
        smaller = self.window_loader.again(local_window)
        self.tell(
            f"Out of memory: update {local_window.window.index + 1} is run again in {len(smaller.micro_batches)} "
            f"passes instead of {len(local_window.micro_batches)}, with the same rows."
        )
        return smaller

    def window_done(self) -> None:
        """After each update."""
        self.memory_limits.went_well()
        self._cut_by_headroom()
        costs = self.calibration.window()
        if costs is not None:
            self.window_loader.planner = replace(self.window_loader.planner, costs=costs)

    def state_dict(self) -> dict[str, Any]:
        costs = self.window_loader.planner.costs
        return {
            "costs": None if costs is None else astuple(costs),
            "headroom": self.memory_limits.state_dict(),
            "measured": self.calibration.windows,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Costs that were measured hold on; where they were being measured, that begins anew."""
        self.memory_limits.load_state_dict(state_dict["headroom"])
        self._cut_by_headroom()
        if self.calibration.windows is not None and (state_dict["measured"] or 0) > MEASURED_WINDOWS:
            self.calibration.windows = state_dict["measured"]
            self.window_loader.planner = replace(self.window_loader.planner, costs=CostModel(*state_dict["costs"]))

    def _cut_by_headroom(self) -> None:
        self.window_loader.planner = replace(self.window_loader.planner, limits=self.memory_limits.limits)
