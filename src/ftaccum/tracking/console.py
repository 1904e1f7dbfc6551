"""What a run prints: banner, progress bar, a line per epoch, result. Only the main process prints."""

import math
import sys
from dataclasses import dataclass

from tqdm import tqdm

from ..planning.base_plan import BasePlan
from .ledger import EpochEntry
from .result import Result

_RULE = "=" * 64
_PRECISIONS = {"no": "full", "bf16": "bf16 autocast", "fp16": "fp16 autocast, scaled gradients"}


@dataclass
class Console:
    """A printer to standard output that leaves the progress bar on standard error intact."""

    is_main: bool
    progress: bool
    _headed: bool = False

    def banner(self, plan: BasePlan, notes: list[str], warmup: int, precision: str, device: str) -> None:
        if warmup > plan.n_windows:
            notes = [*notes, f"Note: the warm-up of {warmup} updates is longer than the run"]
        self._print(
            _RULE,
            "FINE-TUNING TEST",
            _RULE,
            str(plan),
            *notes,
            f"Precision: {_PRECISIONS[precision]}, on {device}",
            _RULE,
        )

    def bar(self, n_windows: int) -> tqdm:
        return tqdm(total=n_windows, desc="updates", disable=not (self.is_main and self.progress), leave=False)

    def epoch(self, entry: EpochEntry, n_epochs: int) -> None:
        """Print a row of the table of epochs, the first time with the heading.

        The validation loss before the first update, if there is one, makes the row of epoch 0.
        """
        if entry.epoch < 0 and entry.val_loss is None:
            return
        cells = {"epoch": f"{entry.epoch + 1}/{n_epochs}", "train loss": _number(entry.train_loss)}
        if entry.val_loss is not None:
            cells["val loss"] = _number(entry.val_loss)
        cells |= {name: _number(value) for name, value in entry.metrics.items()}
        widths = [max(10, len(name)) for name in cells]
        if not self._headed:
            self._headed = True
            self._print("  ".join(f"{name:>{w}}" for name, w in zip(cells, widths, strict=True)))
        self._print("  ".join(f"{text:>{w}}" for text, w in zip(cells.values(), widths, strict=True)))

    def result(self, result: Result) -> None:
        self._print(_RULE, str(result), _RULE)

    def _print(self, *lines: str) -> None:
        if self.is_main:
            tqdm.write("\n".join(lines), file=sys.stdout)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
