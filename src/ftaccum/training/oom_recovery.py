"""What a run learns of its machine, and how the cut of its windows follows: memory that ran out, the cost of a pass."""

from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from ..data.prefetch import Feed, Portion
from ..planning.micro_batches import PassCosts, Slice
from ..runtime.memory import AgreedOutOfMemoryError, Agreement, Failure, Headroom
from .pass_costs import MEASURED_WINDOWS, PassTimer


@dataclass
class Adaptation:
    """Keeps a feed's cutter up to date. All processes come to the same cutter.

    Attributes:
        tell: shows a sentence to the user.
    """

    feed: Feed
    agreement: Agreement
    calibration: PassTimer
    tell: Callable[[str], None]
    headroom: Headroom = field(init=False)

    def __post_init__(self) -> None:
        self.headroom = Headroom(self.feed.cutter.caps)

    def smaller(self, portion: Portion, failed: Failure | None) -> Portion:
        """The same window in smaller micro-batches.

        Args:
            failed: this process's pass that ran out of memory; None where it was another process's.

        Raises:
            torch.OutOfMemoryError: on all processes, where a single row was too much.
        """
        piece = Slice() if failed is None else portion.micro_batches[failed.index].slice
        if self.agreement.any(failed is not None and len(piece.rows) < 2):
            raise AgreedOutOfMemoryError(
                "Memory ran out in a micro-batch of a single row"
                + (f" ({self.feed.loader.name_of(piece.rows[0])})" if piece.rows else "")
                + ". Truncate the rows, use `gradient_checkpointing`, or a smaller model; every update before this one "
                "was taken." + (f" The device said: {failed.said}" if failed is not None else "")
            )
        tokens = self.agreement.least(None if failed is None else piece.tokens)
        assert tokens is not None, "memory ran out on one process at least"
        self.headroom.ran_out(tokens)
        self._cut_by_headroom()
        smaller = self.feed.again(portion)
        self.tell(
            f"Out of memory: update {portion.window.index + 1} is run again in {len(smaller.micro_batches)} passes "
            f"instead of {len(portion.micro_batches)}, with the same rows."
        )
        return smaller

    def window_done(self) -> None:
        """After each update."""
        self.headroom.went_well()
        self._cut_by_headroom()
        costs = self.calibration.window()
        if costs is not None:
            self.feed.cutter = replace(self.feed.cutter, costs=costs)

    def state_dict(self) -> dict[str, Any]:
        costs = self.feed.cutter.costs
        return {
            "costs": None if costs is None else astuple(costs),
            "headroom": self.headroom.state_dict(),
            "measured": self.calibration.windows,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Costs that were measured hold on; where they were being measured, that begins anew."""
        self.headroom.load_state_dict(state_dict["headroom"])
        self._cut_by_headroom()
        if self.calibration.windows is not None and (state_dict["measured"] or 0) > MEASURED_WINDOWS:
            self.calibration.windows = state_dict["measured"]
            self.feed.cutter = replace(self.feed.cutter, costs=PassCosts(*state_dict["costs"]))

    def _cut_by_headroom(self) -> None:
        self.feed.cutter = replace(self.feed.cutter, caps=self.headroom.caps)
