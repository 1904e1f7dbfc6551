"""Figures in tables are not wrapped: cells such as `2.0e-7` and `1.00 (0.93–1.16)` get the class `short`."""

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

_LONGEST = 18


def _mark(_app: Sphinx, doctree: nodes.document) -> None:
    for cell in doctree.findall(nodes.entry):
        text = cell.astext()
        if len(text) <= _LONGEST and any(map(str.isdigit, text)):
            cell["classes"].append("short")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-read", _mark)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
