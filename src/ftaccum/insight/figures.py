"""The figures of runs, drawn with matplotlib from their curves."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .axes import CLIPPING, explain_line, label_positions, scale, title_pad
from .curves import VALIDATION_LOSS, Axis, RunCurves, axes_of, smooth, thin
from .format import format_duration
from .style import color_of, dashes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 2400  # of all curves in a figure: two for each pixel of a large screen
_MEANS = 10  # a curve of many updates is drawn with its running mean, over a tenth of the updates
MIN_SMOOTHED = 50  # updates from which on a curve has a running mean
# Of the parts of time, from the end of the style, because the first colors stand for runs. They are as different as
# possible with normal vision and with the common forms of color blindness.
_PART_COLORS = ("C5", "C4", "C6", "C7")


@dataclass(frozen=True)
class Panel:
    """A figure of one quantity for several runs.

    Attributes:
        title: what it shows.
        draw: draws it for runs that all have the quantity, with the index of each, over an axis.
        has_data: whether a run has it.
        name: the name of the quantity in `RunCurves.gaps`.
        reason: why runs lack it that do not say so themselves.
        has_axis: whether it is drawn over rows or updates.
    """

    title: str
    draw: "Callable[[Axes, Sequence[tuple[int, RunCurves]], Axis], None]"
    has_data: Callable[[RunCurves], bool]
    name: str
    reason: str
    has_axis: bool = True

    def missing_in(self, runs: Sequence[RunCurves]) -> list[RunCurves]:
        """Return the runs that lack the quantity."""
        return [run for run in runs if not self.has_data(run)]

    def why_missing(self, run: RunCurves) -> str:
        """Return why a run lacks the quantity."""
        return run.gaps.get(self.name, self.reason)

    def draw_runs(self, axes: "Axes", runs: Sequence[RunCurves], axis: Axis) -> None:
        """Draw the runs that have the quantity."""
        self.draw(axes, [(n, run) for n, run in enumerate(runs) if self.has_data(run)], axis)
        if self.has_axis:
            label_positions(axes, axis)


def panels_of(runs: Sequence[RunCurves]) -> list[Panel]:
    """Return the panels for some runs: one for each quantity, and one for each metric that a run has."""
    metrics = dict.fromkeys(name for run in runs for name in run.evaluations if name != VALIDATION_LOSS)
    old = "it was not recorded"
    return [
        Panel(
            "Training loss", partial(_draw_updates, read=lambda run: run.loss), _has("loss"), "loss", "none is finite"
        ),
        *(
            Panel(title, partial(_draw_evaluations, name=name), partial(_is_evaluated, name), name, reason)
            for name, title, reason in [
                (VALIDATION_LOSS, "Validation loss", "there were no validation rows"),
                *((name, _shortened(name, 48), "it was not measured") for name in metrics),
            ]
        ),
        Panel("Gradient norm before clipping", _draw_norms, _has("grad_norm"), "grad_norm", "none is finite"),
        Panel("Learning rate", _draw_rates, _has("learning_rate"), "learning_rate", old),
        Panel(
            "Gradient noise scale, with its 90% interval",
            _draw_noise,
            lambda run: _is_any(_noise_of(run)),
            "noise_scale",
            "it was not measured",
        ),
        Panel("Padding", _draw_padding, _has("padding"), "padding", old),
        Panel("Throughput", _draw_speed, _has("speed"), "speed", old),
        Panel("Time of updates", _draw_time, lambda run: bool(run.seconds), "seconds", old, has_axis=False),
    ]


def figure_of(run: RunCurves) -> "Figure":
    """Return one figure with a panel for each quantity that a run has, over rows, or updates if rows are not known."""
    runs = [run]
    axis = axes_of(runs)[0]
    shown = [panel for panel in panels_of(runs) if panel.has_data(run)]
    n_rows, n_columns = max(1, math.ceil(len(shown) / 2)), max(1, min(2, len(shown)))
    figure = new_figure(4.6 * n_columns, 2.7 * n_rows)
    grid = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    for panel, axes in zip(shown, grid, strict=False):
        panel.draw_runs(axes, runs, axis)
        axes.set_title(panel.title, pad=title_pad(axes))
    for axes in grid[len(shown) :]:
        axes.remove()
    return figure


def panel_figure(panel: Panel, runs: Sequence[RunCurves], axis: Axis) -> "Figure":
    """Return a figure of one panel, in a size that a phone can show."""
    shown = len(runs) - len(panel.missing_in(runs))
    figure = new_figure(4.2, 2.8 if panel.has_axis else 1.3 + 0.3 * shown)
    panel.draw_runs(figure.subplots(), runs, axis)
    return figure


def new_figure(width: float, height: float) -> "Figure":
    """Return a new figure. It does not use pyplot, whose global state belongs to the user.

    Args:
        width, height: its size in inches.

    Raises:
        ImportError: if matplotlib is missing.
    """
    from .notebook_figure import NotebookFigure  # it loads matplotlib, which is an extra, and slow to import

    return NotebookFigure(figsize=(width, height), layout="constrained")


def _line_of(n: int) -> dict[str, Any]:
    """Return the color and the dashes of the nth run's line."""
    dashes = dashes_of(n)
    return {"color": _color_of(n), "linestyle": (0, dashes) if dashes else "-"}


def _color_of(n: int) -> str:
    """Return the nth color of the style in use, which may be the user's."""
    return color_of(n).upper()


def _is_any(values: Sequence[float]) -> bool:
    return bool(np.isfinite(np.asarray(values, dtype=float)).any())


def _has(name: str) -> Callable[[RunCurves], bool]:
    return lambda run: _is_any(getattr(run, name))


def _is_evaluated(name: str, run: RunCurves) -> bool:
    return name in run.evaluations and _is_any(run.evaluations[name].values)


def _noise_of(run: RunCurves) -> Sequence[float]:
    return run.noise_scale.lower if run.noise_scale is not None else ()  # may be known without the scale itself


def _draw_updates(
    axes: "Axes",
    runs: Sequence[tuple[int, RunCurves]],
    axis: Axis,
    *,
    read: Callable[[RunCurves], Sequence[float]],
    smooths: bool = True,
) -> None:
    """Draw a value per update; if a run has many updates, all values pale and their running means."""
    smooths = smooths and max(len(run.loss) for _, run in runs) >= MIN_SMOOTHED
    for n, run in runs:
        x, y = run.positions(axis), np.asarray(read(run), dtype=float)
        style: dict[str, Any] = _line_of(n)
        n_points = max(200, _POINTS // len(runs))
        if not smooths:
            axes.plot(*thin(x, y, n_points), linewidth=1.4, marker="." if len(y) == 1 else "", label=run.name, **style)
            continue
        axes.plot(*thin(x, y, 2 * n_points // 3), linewidth=0.5, alpha=0.3, label="_each update", **style)
        mean = smooth(y, max(1, len(y) // _MEANS))
        axes.plot(*thin(x, mean, n_points // 3), linewidth=1.8, label=run.name, **style)


def _draw_evaluations(axes: "Axes", runs: Sequence[tuple[int, RunCurves]], axis: Axis, *, name: str) -> None:
    for n, run in runs:
        found = run.evaluations[name]
        x, y = run.positions(axis, found.updates), np.asarray(found.values, dtype=float)
        marker = "o" if len(y) < 40 else ""
        style: dict[str, Any] = {**_line_of(n), "marker": marker, "markersize": 3, "clip_on": False}
        axes.plot(*thin(x, y, max(200, _POINTS // len(runs))), linewidth=1.4, label=run.name, **style)


def _draw_norms(axes: "Axes", runs: Sequence[tuple[int, RunCurves]], axis: Axis) -> None:
    _draw_updates(axes, runs, axis, read=lambda run: run.grad_norm)
    scale([run.grad_norm for _, run in runs], axes)
    limits = sorted({run.clip_norm for _, run in runs if run.clip_norm is not None})
    for limit in limits:
        axes.axhline(limit, color="0.5", linestyle=CLIPPING, linewidth=1.2, label="_clipping")
    if limits:
        explain_line(axes, CLIPPING, f"clipped to {' and '.join(f'{limit:g}' for limit in limits)}")


def _draw_rates(axes: "Axes", runs: Sequence[tuple[int, RunCurves]], axis: Axis) -> None:
    rates = [np.asarray(run.learning_rate, dtype=float) for _, run in runs]
    _draw_updates(axes, runs, axis, read=lambda run: run.learning_rate, smooths=False)
    # The rate is 0 before a warm-up, and a small share of its peak at the end.
    if scale([np.where(rate > 0, rate, np.nan) for rate in rates], axes):
        axes.set_ylim(bottom=min(np.nanmax(rate) for rate in rates if np.nanmax(rate) > 0) / 50)
    else:
        axes.set_ylim(bottom=0)


def _draw_noise(axes: "Axes", runs: Sequence[tuple[int, RunCurves]], axis: Axis) -> None:
    """Draw the noise scale with its interval, and the rows of an update to compare it with, dotted."""
    noise = [(n, run, run.noise_scale) for n, run in runs if run.noise_scale is not None]
    known = np.concatenate([np.asarray([*found.values, *found.upper, *found.lower], float) for *_, found in noise])
    top, has_rows = 2 * known[np.isfinite(known)].max(), False
    for n, run, found in noise:
        x, y = run.positions(axis, found.updates), np.asarray(found.values, dtype=float)
        lower, upper = np.asarray(found.lower, dtype=float), np.asarray(found.upper, dtype=float)
        upper = np.where(np.isfinite(lower) & ~np.isfinite(upper), top, upper)
        kept = np.isin(x, thin(x, y, 600)[0])
        axes.fill_between(x[kept], lower[kept], upper[kept], color=_color_of(n), alpha=0.2, linewidth=0)
        axes.plot(x[kept], y[kept], linewidth=1.4, label=run.name, **_line_of(n))
        if len(run.update_rows):
            rows = thin(run.positions(axis), np.asarray(run.update_rows, dtype=float), 200)
            axes.plot(*rows, color=_color_of(n), linestyle=":", linewidth=1, label="_rows of an update")
            has_rows = True
    positive = known[known > 0]  # a lower end may be 0
    bottom = max(1.0, positive.min()) / 1.5 if len(positive) and scale([positive], axes) else axes.get_ylim()[0]
    axes.set_ylim(bottom, min(top, axes.get_ylim()[1]))
    axes.set_ylabel("rows")
    if has_rows:
        explain_line(axes, ":", "rows of an update")


def _draw_padding(axes: "Axes", runs: Sequence[tuple[int, RunCurves]], axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    _draw_updates(axes, runs, axis, read=lambda run: run.padding)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_ylim(bottom=0)


def _draw_speed(axes: "Axes", runs: Sequence[tuple[int, RunCurves]], axis: Axis) -> None:
    from matplotlib.ticker import EngFormatter

    _draw_updates(axes, runs, axis, read=lambda run: run.speed)
    if not scale([run.speed for _, run in runs], axes):
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel(" or ".join(dict.fromkeys(run.speed_unit for _, run in runs)) + " per second")


def _draw_time(axes: "Axes", runs: Sequence[tuple[int, RunCurves]], axis: Axis) -> None:  # noqa: ARG001
    """Draw a bar of shares for each run."""
    parts = list(dict.fromkeys(part for _, run in runs for part in run.seconds))
    names = [_shortened(run.name) for _, run in runs]
    totals = np.array([sum(run.seconds.values()) for _, run in runs])
    left = np.zeros(len(runs))
    for n, part in enumerate(parts):
        shares = np.array([run.seconds.get(part, 0.0) for _, run in runs]) / totals
        axes.barh(
            range(len(runs)),
            shares,
            0.6 if len(runs) > 1 else 0.4,
            left,
            facecolor=_PART_COLORS[n % len(_PART_COLORS)],
            edgecolor=axes.figure.get_facecolor(),  # a gap between parts
            linewidth=1.2,
            label=part,
        )
        left += shares
    axes.set_yticks(
        range(len(runs)), [f"{name}\n{format_duration(t)}".strip() for name, t in zip(names, totals, strict=True)]
    )
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a run may be named $a$
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.grid(False)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize="small", frameon=False)


def _shortened(name: str, length: int = 16) -> str:
    end = length // 2
    return name if len(name) <= length else f"{name[: length - end - 1]}…{name[-end:]}"
