"""The report of one run or several: a page with their curves, results, settings and versions."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .curves import AXIS_LABELS, Axis, RunCurves, axes_of
from .figures import MIN_SMOOTHED, Panel, panel_figure, panels_of
from .format import UNKNOWN
from .page import details, figure, figures, heading, legend, named_values, page, paragraph, table
from .style import as_svg, page_style

# Without a script: of the two figures of a panel, the one whose axis is not chosen is hidden.
_SWITCH = "".join(f"#by-{axis}:not(:checked)~.figures .by-{axis}{{display:none}}" for axis in AXIS_LABELS)


def report_page(runs: Sequence[RunCurves], axis: Axis | None = None) -> str:
    """Return the page.

    Args:
        runs: the runs, with different names.
        axis: what the page first draws the curves over; None for rows if all runs know them, else updates.

    Raises:
        ImportError: if matplotlib is missing.
    """
    names = [run.name for run in runs]
    parts = [legend(names)] if len(runs) > 1 else [paragraph(run.subject) for run in runs if run.subject]
    parts += [heading("Results"), _compared(_results(runs), names)]
    parts += [heading("Curves"), *_curves(runs, axis), heading("Settings"), *_settings(runs)]
    if any(run.environment for run in runs):
        parts += [heading("Environment"), _compared([run.environment for run in runs], names, joins=True)]
    return page(_title(names), parts, _SWITCH)


def _title(names: Sequence[str]) -> str:
    if len(names) > 1:
        return f"{len(names)} runs"
    return f"Run {names[0]}" if names[0] else "Fine-tuning run"


def _results(runs: Sequence[RunCurves]) -> list[Mapping[str, str]]:
    """Return the results of runs that at least one of them has. They begin with subjects if there are several runs."""
    subjects = [{"run of": run.subject} if len(runs) > 1 else {} for run in runs]
    results = [{**subject, **run.outcome} for subject, run in zip(subjects, runs, strict=True)]
    known = {name for each in results for name, text in each.items() if text}
    return [{name: text for name, text in each.items() if name in known} for each in results]


def _curves(runs: Sequence[RunCurves], first: Axis | None) -> Iterable[str]:
    """Return the figures, and a switch between their axes."""
    axes, panels = axes_of(runs), panels_of(runs)
    chosen = first if first in axes else axes[0]
    if len(axes) > 1:
        for axis in axes:
            checked = " checked" if axis == chosen else ""
            yield f'<input type="radio" name="axis" id="by-{axis}"{checked}>'
            yield f'<label for="by-{axis}">{AXIS_LABELS[axis]}</label>'
    shown = [panel for panel in panels if len(panel.missing_in(runs)) < len(runs)]
    with page_style():
        drawn = [_figure(n, panel, runs, axis) for n, panel in enumerate(shown) for axis in _axes_of(panel, axes)]
    yield figures(drawn)
    if any(len(run.loss) >= MIN_SMOOTHED for run in runs):
        yield paragraph("Pale lines show every update, and bold ones the mean over a tenth of the updates.", "note")
    yield from (paragraph(sentence, "note") for sentence in _missing(panels, runs))


def _axes_of(panel: Panel, axes: Sequence[Axis]) -> Sequence[Axis]:
    return axes if panel.has_axis else axes[:1]


def _figure(n: int, panel: Panel, runs: Sequence[RunCurves], axis: Axis) -> str:
    label = f"{panel.title} over {AXIS_LABELS[axis]}" if panel.has_axis else panel.title
    svg = as_svg(panel_figure(panel, runs, axis), label, f"f{n}{axis[0]}-")
    return figure(panel.title, svg, f"by-{axis}" if panel.has_axis else "")


def _missing(panels: Sequence[Panel], runs: Sequence[RunCurves]) -> list[str]:
    """Return sentences on the figures that runs lack, one for each reason and runs."""
    found: dict[tuple[str, str], list[str]] = {}
    for panel in panels:
        lacking: dict[str, list[RunCurves]] = {}
        for run in panel.missing_in(runs):
            lacking.setdefault(panel.why_missing(run), []).append(run)
        for reason, those in lacking.items():
            which = "" if len(those) == len(runs) else f" for {', '.join(run.name for run in those)}"
            found.setdefault((which, reason), []).append(panel.title)
    return [f"Not shown{which}: {', '.join(titles)}. Reason: {reason}." for (which, reason), titles in found.items()]


def _settings(runs: Sequence[RunCurves]) -> Iterable[str]:
    """Return those that differ between the runs, then those that are not at their defaults, then the others."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    if not names:
        yield paragraph("The settings are not known: they are in the output folder of a run.")
        return
    every = {name: [_shown(run.settings, name) for run in runs] for name in names}
    same = {name: values[0] for name, values in every.items() if len(set(values)) == 1}
    if len(runs) > 1:
        differ = [[name, *values] for name, values in every.items() if name not in same]
        columns = ["different", *(run.name for run in runs)]
        yield table(differ, columns, has_names=True) if differ else paragraph("All settings are the same.")
    changed = {name: same[name] for name in dict.fromkeys(name for run in runs for name in run.changed) if name in same}
    # An empty default only says that another setting or the library decides.
    others = {name: text for name, text in same.items() if name not in changed and text not in ("None", "[]")}
    in_all = " that are the same in all runs" if len(runs) > 1 else ""
    if changed:
        yield (
            named_values(changed)
            if len(runs) == 1
            else details(f"{len(changed)} settings{in_all}", named_values(changed))
        )
    if others:
        yield details(f"{len(others)} settings at their defaults", named_values(others))


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return str(settings[name]) if name in settings else UNKNOWN


def _merged(orders: Sequence[list[str]]) -> list[str]:
    """Return the names in all lists, in an order that does not depend on that of the lists: each after those before."""
    merged: list[str] = []
    for order in sorted(orders, reverse=True):
        place = 0
        for name in order:
            if name not in merged:
                merged.insert(place, name)
            place = merged.index(name) + 1
    return merged


def _compared(values: Sequence[Mapping[str, str]], names: Sequence[str], *, joins: bool = False) -> str:
    """Return a table with a column for each run; with `joins`, a single one if all are equal."""
    if joins and all(each == values[0] for each in values):
        return named_values(values[0])
    rows = _merged([list(each) for each in values])
    columns = ["", *names] if len(names) > 1 else ()
    return table([[row, *(each.get(row) or UNKNOWN for each in values)] for row in rows], columns, has_names=True)
