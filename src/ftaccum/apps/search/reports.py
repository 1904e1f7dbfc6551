"""A finished study on disk: the table, plots, and one page with all of it."""

import base64
import csv
import html
import io
import warnings
from pathlib import Path
from typing import Any

from optuna import Study

from .tables import shown, summary, table

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;font-size:13px}td,th{padding:.2rem .7rem;text-align:right;"
    "border-bottom:1px solid #ddd}td:last-child,th:last-child{text-align:left}"
    "img{max-width:100%}pre{background:#f6f6f6;padding:1rem;overflow:auto}"
)


def write_reports(study: Study, folder: Path | None) -> None:
    """`trials.csv`, and where matplotlib is installed, plots as PNG; `report.html`, which needs no other file."""
    if folder is None:
        return
    rows = table(study)
    with (folder / "trials.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([list(rows[0]), *(row.values() for row in rows)] if rows else [])
    (folder / "report.html").write_text(_page(study, rows, _plots(study, folder)), encoding="utf-8")


def _plots(study: Study, folder: Path) -> dict[str, bytes]:
    try:
        from .plots import PLOTS
    except ImportError:  # matplotlib is an extra
        return {}
    images = {}
    for name, plot in PLOTS.items():
        try:
            figure = plot(study)
            if figure is not None:
                image = io.BytesIO()
                figure.savefig(image, format="png", dpi=120)
                (folder / f"{name}.png").write_bytes(image.getvalue())
                images[name] = image.getvalue()
        except Exception as error:  # of a search that has taken hours
            warnings.warn(f"The plot {name!r} could not be drawn: {error!r}", stacklevel=2)
    return images


def _page(study: Study, rows: list[dict[str, Any]], images: dict[str, bytes]) -> str:
    name = html.escape(study.study_name)
    parts = [f"<h1>Search {name}</h1>", f"<pre>{html.escape(summary(study))}</pre>"]
    for title, image in images.items():
        data = base64.b64encode(image).decode()
        parts.append(f'<h2>{title.capitalize()}</h2><p><img src="data:image/png;base64,{data}" alt="{title}"></p>')
    if not images:
        parts.append("<p>Plots need matplotlib: <code>pip install ftaccum[plots]</code>.</p>")
    parts.append("<h2>Trials</h2><table>" + _row("th", rows[0] if rows else {}))
    parts += [_row("td", [shown(value) for value in row.values()]) for row in rows]
    body = "\n".join([*parts, "</table>"])
    head = f'<meta charset="utf-8"><title>Search {name}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{body}</body></html>\n"


def _row(tag: str, cells: Any) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"
