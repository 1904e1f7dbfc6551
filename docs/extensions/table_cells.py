"""Classes for tables and their cells. `_static/site.css` defines their layout.

- Figures such as `2.0e-7` and `1.00 (0.93–1.16)` get the class `short`: they are not wrapped.
- Sentences in tables of three columns or more get the class `long`: they stay wide enough to read, and the table
  scrolls in its box.
- Tables of names with a sentence on each, such as those of options, get the class `names`: on a narrow screen, the
  sentence is below its name.
"""

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

_SHORT = 18
_LONG = 50


def _mark(_app: Sphinx, doctree: nodes.document) -> None:
    for table in doctree.findall(nodes.table):
        rows = [row.children for body in table.findall(nodes.tbody) for row in body.children]
        for row in rows:
            for cell in row:
                if (kind := _kind(cell.astext(), len(row))) is not None:
                    cell["classes"].append(kind)
        if all(map(_starts_with_name, rows)) and any("long" in row[2]["classes"] for row in rows if len(row) in (3, 4)):
            table["classes"].append("names")


def _kind(text: str, n_columns: int) -> str | None:
    if len(text) <= _SHORT and any(map(str.isdigit, text)):
        return "short"
    return "long" if len(text) > _LONG and n_columns > 2 else None


def _starts_with_name(row: list[nodes.entry]) -> bool:
    return row[0].next_node(nodes.literal) is not None


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-read", _mark)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
