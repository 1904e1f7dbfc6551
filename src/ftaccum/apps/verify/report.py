"""The result of a verification: a table, its verdict, and JSON."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

_RULE = "=" * 88
_WIDTH = 88


@dataclass(frozen=True)
class SplitResult:
    """A window that was accumulated in one way, compared with the same rows in one batch.

    Attributes:
        split: the name of the way to split the window.
        rows: number of rows of the window, on all processes.
        passes: number of forward and backward passes of each process.
        gradient_error: ‖gradient - gradient of one batch‖ / ‖gradient of one batch‖, the largest of any process; None
            if it is not finite, or was not measured.
        loss_error: the relative error of the loss, in the same way.
        exact: whether both errors count as rounding; None for results that are only shown for comparison.
        note: why there are no errors, or a remark on them.
    """

    split: str
    rows: int
    passes: int
    gradient_error: float | None = None
    loss_error: float | None = None
    exact: bool | None = None
    note: str = ""

    def cells(self) -> list[str]:
        verdict = {True: "exact", False: "NOT exact", None: ""}[self.exact]
        figures = [_figure(self.gradient_error), _figure(self.loss_error)]
        return [self.split, str(self.rows), str(self.passes), *figures, " ".join(filter(None, [verdict, self.note]))]


@dataclass(frozen=True)
class Verification:
    """The result of `verify`: whether accumulation equals one large batch, on a user's model and rows.

    It is true if every split is exact. It prints as a table, and can be saved and loaded as JSON.

    Attributes:
        splits: the results of ftaccum's accumulation, for each split of the rows.
        others: the results of other ways to accumulate the same rows, for comparison.
        floor: the error that rounding alone causes: the relative difference between one batch and the same batch with
            its rows reversed and its loss multiplied by a third.
        tolerance: the largest error that counts as rounding.
        dtype: the type of the weights during the measurement; `autocast` is the type that autocast used, or "no".
        counted_by: what the loss is a mean over, and how this was found.
        reasons: why accumulating this loss is not exact, according to the check before training.
        notes: further remarks on the measurement.
        seconds: the duration of the measurement.
        loss_over: what the loss reads: "items", or "window" for all rows of an update together.
    """

    model: str
    n_parameters: int
    splits: list[SplitResult]
    others: list[SplitResult]
    floor: float
    tolerance: float
    dtype: str
    autocast: str
    device: str
    counted_by: str
    reasons: list[str]
    notes: list[str]
    batch_size: int
    gradient_accumulation_steps: int
    effective_batch_size: int
    num_processes: int
    random_seed: int
    versions: dict[str, str]
    seconds: float
    loss_over: str = "items"

    @property
    def exact(self) -> bool:
        """Whether every split has the gradient and the loss of one batch, up to rounding."""
        return all(measured.exact for measured in self.splits)

    def __bool__(self) -> bool:
        return self.exact

    def __str__(self) -> str:
        sizes = f"{self.batch_size} × {self.gradient_accumulation_steps}"
        sizes += f" × {self.num_processes} processes" if self.num_processes > 1 else ""
        precision = self.dtype if self.autocast == "no" else f"{self.dtype} under {self.autocast} autocast"
        heading = ["", "rows", "passes", "gradient off by", "loss off by", ""]
        widths = [max(map(len, column)) for column in zip(heading, *map(SplitResult.cells, self._rows), strict=True)]
        return "\n".join(
            [
                _RULE,
                "ACCUMULATION AGAINST ONE BATCH",
                _RULE,
                f"Model: {self.model}, {self.n_parameters:,} parameters, in {precision}, on {self.device}",
                f"Rows of an update: {self.effective_batch_size} ({sizes})",
                f"Loss: {'over' if self.loss_over == 'window' else 'mean over'} {self.counted_by}",
                *(line for note in self.notes for line in _wrapped(note)),
                "",
                _line(heading, widths),
                *(_line(measured.cells(), widths) for measured in self.splits),
                *(["for comparison"] if self.others else []),
                *(_line(measured.cells(), widths) for measured in self.others),
                "",
                "Errors are relative to the norm of the gradient, and to the loss, of one batch.",
                f"Rounding alone causes errors of {_figure(self.floor)}; "
                f"up to {_figure(self.tolerance)} counts as exact.",
                *(line for sentence in [self.verdict, *self.reasons] for line in _wrapped(sentence)),
                _RULE,
            ]
        )

    @property
    def verdict(self) -> str:
        """The result in a sentence."""
        if self.exact:
            return "EXACT: however the rows are split, gradient and loss are those of one batch."
        failed = [measured for measured in self.splits if not measured.exact]
        worst = max(failed, key=lambda measured: measured.gradient_error or 0.0)
        remedy = "" if self.reasons else " The check before training found no reason. Is `count_items` right?"
        if not self.reasons and "weighted by" in self.counted_by:
            remedy = (
                " The weights of the loss were measured in float32, which is right to about 1e-6. Give them, as "
                "`loss_fn=nn.CrossEntropyLoss(weight=…)` or in `count_items`, to have them in full precision."
            )
        return (
            f"NOT EXACT: {len(failed)} of {len(self.splits)} ways to split the rows differ from one batch; the "
            f"gradient of '{worst.split}' is off by {_figure(worst.gradient_error)}.{remedy}"
        )

    def to_json(self) -> str:
        return json.dumps({"exact": self.exact, "verdict": self.verdict, **asdict(self)}, indent=2, allow_nan=False)

    def save(self, path: str | Path) -> None:
        """Save the verification as JSON."""
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Verification":
        """Load a verification that `save` wrote."""
        read: Mapping[str, Any] = json.loads(Path(path).read_text())
        known = {f.name: read[f.name] for f in fields(cls)}
        for name in ("splits", "others"):
            known[name] = [SplitResult(**measured) for measured in known[name]]
        return cls(**known)

    @property
    def _rows(self) -> list[SplitResult]:
        return [*self.splits, *self.others]


def _figure(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}" if 0 < error < 0.01 else f"{error:.2g}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers, last = cells
    width, *others = widths[:-1]
    numbers = [f"{number:>{w}}" for number, w in zip(numbers, others, strict=True)]
    return "  ".join([f"{name:<{width}}", *numbers, last]).rstrip()


def _wrapped(sentence: str) -> list[str]:
    return textwrap.wrap(sentence, _WIDTH, subsequent_indent="  ", break_long_words=False)
