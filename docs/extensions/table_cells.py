"""Classes of tables and their cells, which `_static/site.css` lays out.

- Figures such as `2.0e-7` and `1.00 (0.93–1.16)` get the class `short`: they are not wrapped.
- Sentences get the class `long`: they stay wide enough to read, and the table scrolls in its box.
- Tables of names with sentences on each, such as those of options, get the class `names`: on a narrow screen, their
  sentences are below the names.
"""

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

_SHORT = 18
_LONG = 60


def _mark(_app: Sphinx, doctree: nodes.document) -> None:
    for cell in doctree.findall(nodes.entry):
        text = cell.astext()
        if len(text) <= _SHORT and any(map(str.isdigit, text)):
            cell["classes"].append("short")
        elif len(text) > _LONG:
            cell["classes"].append("long")
    for table in doctree.findall(nodes.table):
        if _has_names_and_sentences(table):
            table["classes"].append("names")


def _has_names_and_sentences(table: nodes.table) -> bool:
    rows = [row.children for body in table.findall(nodes.tbody) for row in body.children]
    names = all(row[0].next_node(nodes.literal) is not None for row in rows)
    return names and any("long" in row[2]["classes"] for row in rows if 3 <= len(row) <= 4)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-read", _mark)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
