"""The curves of a run: plain numbers, from which figures and pages are made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Axis = Literal["rows", "updates"]
AXIS_LABELS: Mapping[Axis, str] = {"rows": "rows trained on", "updates": "updates"}
VALIDATION_LOSS = "validation loss"


@dataclass(frozen=True)
class Measured:
    """Values that are known at some updates only.

    Attributes:
        updates: the number of updates before each value.
        values: the values.
    """

    updates: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class NoiseScaleCurve:
    """The gradient noise scale of a run in rows, with its 90% interval; NaN where it is not known.

    Attributes:
        updates: the number of each measured update, from 1.
        values: the noise scale so far; NaN also while it has only a lower end.
        lower, upper: the ends of its interval. An upper end that is NaN beside a known lower one has no limit.
    """

    updates: Sequence[int]
    values: Sequence[float]
    lower: Sequence[float]
    upper: Sequence[float]


@dataclass(frozen=True, eq=False)
class RunCurves:
    """The curves and metadata of one run. Whatever is not known is empty.

    Attributes:
        name: a short name, different from those of other runs on the page; empty if the page has only this run.
        subject: the model, the data and the date of the run, as one line.
        loss, grad_norm, learning_rate: one value per update; the norm is before clipping.
        rows: rows trained on after each update, or empty.
        update_rows: rows of each update, or empty.
        clip_norm: largest norm that clipping allows, if any.
        evaluations: the validation loss and the metrics, by name.
        noise_scale: the gradient noise scale, if it was measured.
        padding: share of padding in the token positions of each update.
        speed, speed_unit: tokens or rows per second of each update.
        seconds: time of all updates by its use.
        gaps: why quantities are missing, by the names of these attributes.
        outcome: the result, as names and texts; a text is empty if it is not known.
        settings: the settings of the run, by name.
        changed: the names of those that say most about the run, because they are not at their defaults.
        environment: versions and device, by name.
    """

    name: str
    loss: Sequence[float]
    grad_norm: Sequence[float]
    learning_rate: Sequence[float]
    rows: Sequence[int] = ()
    update_rows: Sequence[int] = ()
    subject: str = ""
    clip_norm: float | None = None
    evaluations: Mapping[str, Measured] = field(default_factory=dict)
    noise_scale: NoiseScaleCurve | None = None
    padding: Sequence[float] = ()
    speed: Sequence[float] = ()
    speed_unit: str = "tokens"
    seconds: Mapping[str, float] = field(default_factory=dict)
    gaps: Mapping[str, str] = field(default_factory=dict)
    outcome: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    changed: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def positions(self, axis: Axis, updates: Sequence[int] | None = None) -> np.ndarray:
        """Return where values lie on an axis.

        Args:
            axis: "rows" or "updates".
            updates: the number of updates before each value; None for one value per update.
        """
        numbers = np.arange(1, len(self.loss) + 1) if updates is None else np.asarray(updates, dtype=int)
        return numbers if axis == "updates" else np.concatenate([[0], np.asarray(self.rows)])[numbers]


def axes_of(runs: Sequence[RunCurves]) -> list[Axis]:
    """Return the axes on which all runs can be drawn together: updates, and rows if all runs know them."""
    return ["rows", "updates"] if all(len(run.rows) for run in runs) else ["updates"]


def thin(x: np.ndarray, y: np.ndarray, n_points: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a curve with about `n_points` points. It keeps its ends, and the extremes of each stretch.

    Args:
        x, y: the curve. Values of y may be NaN.
        n_points: most points, apart from the two ends.
    """
    if len(x) <= n_points:
        return x, y
    kept = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(len(x)), max(1, n_points // 2)):
        known = stretch[np.isfinite(y[stretch])]
        kept |= {int(known[y[known].argmin()]), int(known[y[known].argmax()])} if len(known) else {int(stretch[0])}
    indices = np.array(sorted(kept))
    return x[indices], y[indices]


def smooth(y: np.ndarray, width: int) -> np.ndarray:
    """Return the mean of the `width` values around each value, without those that are not finite."""
    known = np.isfinite(y)
    sums, counts = (np.concatenate([[0], np.cumsum(v)]) for v in (np.where(known, y, 0.0), known))
    ends = np.minimum(np.arange(len(y)) + (width + 1) // 2, len(y))
    starts = np.maximum(np.arange(len(y)) - width // 2, 0)
    counted = counts[ends] - counts[starts]
    return np.where(counted > 0, (sums[ends] - sums[starts]) / np.maximum(counted, 1), np.nan)
