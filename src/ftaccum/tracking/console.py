"""What a run prints: banner, progress, a line per evaluation, result. Only the main process prints."""

from dataclasses import dataclass
from pathlib import Path

from ..insight.format import format_number, known
from ..planning.base_plan import BasePlan
from ..runtime.progress_bar import print_above_bars
from .ledger import EpochEntry, EvaluationEntry
from .progress import Progress
from .result import Result

_RULE = "=" * 64
_PRECISIONS = {"no": "full", "bf16": "bf16 autocast", "fp16": "fp16 autocast, scaled gradients"}


@dataclass
class Console:
    """A printer to standard output that leaves the progress bar on standard error intact."""

    is_main: bool
    progress: bool
    _headed: bool = False

    def banner(
        self, plan: BasePlan, notes: list[str], warmup: int, precision: str, device: str, outputs: list[str]
    ) -> None:
        """Print what the run will do.

        Args:
            notes: lines on the data, the loss and the micro-batches.
            warmup: number of warm-up updates.
            outputs: lines on where the run is saved and how it resumes.
        """
        if warmup > plan.n_windows:
            notes = [*notes, f"Note: the warm-up of {warmup} updates is longer than the run"]
        self._print(
            _RULE,
            "FINE-TUNING TEST",
            _RULE,
            str(plan),
            *notes,
            f"Precision: {_PRECISIONS[precision]}, on {device}",
            *outputs,
            _RULE,
        )

    def bar(self, n_windows: int) -> Progress:
        return Progress(n_windows, bar=self.is_main and self.progress, lines=self.is_main)

    def evaluation(self, entry: EvaluationEntry, plan: BasePlan) -> None:
        """Print a row of the table of evaluations, the first time with the heading."""
        epochs = f"{plan.epochs_after(entry.evaluation):.2f}".rstrip("0").rstrip(".")
        cells = {"epoch": f"{epochs}/{plan.n_epochs}", "update": str(entry.evaluation)}
        numbers = {"train loss": known(entry.train_loss), "val loss": entry.val_loss, **entry.metrics}
        self._row(cells | {name: format_number(value) for name, value in numbers.items()})

    def epoch(self, entry: EpochEntry, plan: BasePlan) -> None:
        """Print a row of the table of epochs, for a run without validation rows."""
        self._row({"epoch": f"{entry.epoch + 1}/{plan.n_epochs}", "train loss": format_number(known(entry.train_loss))})

    def _row(self, cells: dict[str, str]) -> None:
        widths = [max(10, len(name)) for name in cells]
        if not self._headed:
            self._headed = True
            self._print("  ".join(f"{name:>{w}}" for name, w in zip(cells, widths, strict=True)))
        self._print("  ".join(f"{text:>{w}}" for text, w in zip(cells.values(), widths, strict=True)))

    def result(self, result: Result) -> None:
        self._print(_RULE, str(result), _RULE)

    def _print(self, *lines: str) -> None:
        if self.is_main:
            print_above_bars("\n".join(lines))


def describe_outputs(folder: Path | None, resume_command: str | None) -> list[str]:
    """Return the banner's lines on where a run is saved and how it resumes.

    Args:
        folder: the output folder, if any.
        resume_command: the command that resumes the run; None if a call from Python started it.
    """
    if folder is None:
        return ["Nothing will be saved: `output_dir` is None."]
    resume = resume_command or "make the same call with `resume='auto'` (`--resume auto`)"
    return [f"Outputs: {folder}", f"To resume the run if it is interrupted: {resume}"]
