"""The axes of figures: their scales, their labels and the lines on them that are no curves."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .curves import AXIS_LABELS, Axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLIPPING = (0, (5, 3))  # the style of the line at the limit of clipping
_WIDE_RANGE = 8  # the ratio of values from which on an axis is logarithmic


def scale(values: Sequence[Sequence[float] | np.ndarray], axes: "Axes") -> bool:
    """Make an axis logarithmic if a few values are very large, or if runs differ so much that one hides another.

    Args:
        values: those of each run, which may be NaN.
        axes: where they are drawn.

    Returns:
        Whether the axis is logarithmic. It never is if a value is not positive.
    """
    from matplotlib.ticker import FuncFormatter, NullFormatter

    runs = [np.asarray(each, dtype=float) for each in values]
    runs = [finite for each in runs if len(finite := each[np.isfinite(each)])]
    if not runs or min(each.min() for each in runs) <= 0:
        return False
    every, middles = np.concatenate(runs), [float(np.median(each)) for each in runs]
    if max(every.max() / np.median(every), max(middles) / min(middles)) <= _WIDE_RANGE:
        return False
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return True


def label_positions(axes: "Axes", axis: Axis) -> None:
    """Label the horizontal axis, which begins at 0."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_xlim(left=0)
    axes.set_xlabel(AXIS_LABELS[axis])
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def explain_line(axes: "Axes", style: Any, words: str) -> None:
    """Say above the axes what a line of some style means, whatever its color."""
    from matplotlib.lines import Line2D

    line = Line2D([], [], color="0.5", linestyle=style, linewidth=1.2, label=words)
    axes.legend(handles=[line], loc="lower right", bbox_to_anchor=(1, 1), fontsize="small", frameon=False, borderpad=0)


def title_pad(axes: "Axes") -> float | None:
    """Return the distance of a title from the axes in points, above their legend; None if they have none."""
    legend = axes.get_legend()
    return None if legend is None else 18.0 * -(-len(legend.get_texts()) // 2)
