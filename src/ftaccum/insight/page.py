"""Self-contained HTML pages: one file with text, tables and figures, in a light and a dark theme, for any width."""

import html
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from string import Template

from .markdown import without_control_characters
from .style import color_of, dashes_of, theme_css


def page(title: str, parts: Iterable[str], style: str = "") -> str:
    """Return a page.

    Args:
        title: its title and heading, as plain text.
        parts: HTML for its body.
        style: more CSS.
    """
    css = "\n".join([theme_css(), _resource("page.css"), style])
    body = "\n".join([heading(title, 1), *parts])
    whole = Template(_resource("page.html")).substitute(title=html.escape(title), style=css, body=body)
    return without_control_characters(whole)


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
    """Return the names of runs with the lines of their curves."""
    entries = (f"<li>{_swatch(n)}{html.escape(name)}</li>" for n, name in enumerate(names))
    return f'<ul class="runs">{"".join(entries)}</ul>'


def _swatch(n: int) -> str:
    """Return a piece of the nth run's line."""
    width = 3
    dashes = " ".join(f"{width * length:g}" for length in dashes_of(n))
    line = f'<line x2="40" y1="2" y2="2" stroke="var(--{color_of(n)})" stroke-width="{width}"'
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<svg class="swatch" viewBox="0 0 40 4" aria-hidden="true">{line}{dashed}/></svg>'


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _row(cells: Iterable[str]) -> str:
    return f"<tr>{''.join(cells)}</tr>"


def _cell(tag: str, text: str, kind: str = "") -> str:
    kind = kind or ("short" if tag == "td" and len(text) <= 16 else "")
    return f"<{tag}{_class(kind)}>{html.escape(text)}</{tag}>"
