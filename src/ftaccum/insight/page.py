"""Self-contained HTML pages: one file with text, tables and figures, in a light and a dark theme, for any width."""

import html
from collections.abc import Iterable, Mapping, Sequence

from .style import N_COLORS, theme_css

_STYLE = (
    "*{box-sizing:border-box}body{font:15px/1.5 system-ui,sans-serif;max-width:88rem;margin:0 auto;padding:1rem;"
    "color:var(--ink);background:var(--page)}h1{font-size:1.5rem;overflow-wrap:anywhere}h2{font-size:1.2rem;"
    "margin:2rem 0 .6rem}h1,h2,figcaption{line-height:1.25}.scroll{overflow-x:auto}"
    "table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}"
    "td,th{padding:.25rem 1rem .25rem 0;text-align:left;border-bottom:1px solid var(--grid);vertical-align:top}"
    "td{max-width:40rem;min-width:6.5rem}td.short{white-space:nowrap;min-width:0}"
    "th{font-weight:600}th.name{position:sticky;left:0;background:var(--page)}pre{background:var(--code);padding:.8rem;overflow-x:auto;border-radius:4px;font-size:13px}"
    "code{background:var(--code);padding:0 .2em;border-radius:3px}.note{color:var(--muted)}"
    ".figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));gap:1.2rem}"
    "figure{margin:0;min-width:0;max-width:36rem}figcaption{font-weight:600}svg{display:block;width:100%;height:auto}"
    "svg text{font-family:system-ui,sans-serif!important}"
    ".runs{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;list-style:none;padding:0}.runs li{overflow-wrap:anywhere}"
    ".swatch{display:inline-block;width:1.4em;border-top:3px solid;vertical-align:middle;margin-right:.5em}"
    "summary{cursor:pointer;font-weight:600}details{margin:.6rem 0}input{accent-color:var(--c0)}"
    "label{margin:0 1.2em .8em 0;display:inline-block}"
    "@media(max-width:40rem){td,th{padding-right:.7rem;font-size:13px}th.name{min-width:6.6rem}h1{font-size:1.3rem}}"
)


def page(title: str, parts: Iterable[str], style: str = "") -> str:
    """Return a page.

    Args:
        title: its title and heading, as plain text.
        parts: HTML for its body.
        style: more CSS.
    """
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{theme_css()}{_STYLE}{style}</style>"
    )
    body = "\n".join([heading(title, 1), *parts])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph of plain text. Its kind is a class of the style, such as "note"."""
    return f"<p{_class(kind)}>{html.escape(text)}</p>"


def preformatted(text: str) -> str:
    return f'<pre tabindex="0">{html.escape(text)}</pre>'


def table(rows: Iterable[Sequence[str]], columns: Sequence[str] = (), *, has_names: bool = False) -> str:
    """Return a table, which scrolls inside the page if it is wide.

    Args:
        rows: the cells of each row.
        columns: headings of the columns; none for no headings.
        has_names: whether the first cell of a row is its name.
    """
    lines = [_row([_cell("th", cell) for cell in columns])] if columns else []
    for first, *others in rows:
        name = _cell("th", first, "name") if has_names else _cell("td", first)
        lines.append(_row([name, *(_cell("td", cell) for cell in others)]))
    return f'<div class="scroll" tabindex="0"><table>{"".join(lines)}</table></div>'


def named_values(values: Mapping[str, str]) -> str:
    """Return a table of names and values."""
    return table(values.items(), has_names=True)


def figure(title: str, svg: str, kind: str = "") -> str:
    """Return an SVG figure with its title. Its kind is a class of the style."""
    return f"<figure{_class(kind)}><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"


def figures(parts: Iterable[str]) -> str:
    """Return figures in as many columns as the page is wide."""
    return f'<div class="figures">{"".join(parts)}</div>'


def details(summary: str, content: str) -> str:
    """Return content that a click opens."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def legend(names: Sequence[str]) -> str:
    """Return the names of runs with the colours of their curves."""
    lines = ("solid", "dashed", "dotted", "dashed")
    entries = (
        f'<li><span class="swatch" style="border-color:var(--c{n % N_COLORS});'
        f'border-top-style:{lines[n // N_COLORS % len(lines)]}"></span>{html.escape(name)}</li>'
        for n, name in enumerate(names)
    )
    return f'<ul class="runs">{"".join(entries)}</ul>'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _row(cells: Iterable[str]) -> str:
    return f"<tr>{''.join(cells)}</tr>"


def _cell(tag: str, text: str, kind: str = "") -> str:
    kind = kind or ("short" if tag == "td" and len(text) <= 16 else "")
    return f"<{tag}{_class(kind)}>{html.escape(text)}</{tag}>"
