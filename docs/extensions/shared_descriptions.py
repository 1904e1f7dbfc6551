"""Docstrings that describe several arguments or attributes in one entry, as in `train_data, val_data: the rows`.

Sphinx takes all but the last of these names for a type. This extension joins them by slashes.
"""

import re
from typing import Any

from sphinx.application import Sphinx

_FIELD = re.compile(r"^:(ivar|param) ([\\\w]+(?:, [\\\w]+)+):")


def _join(_app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    lines[:] = [_FIELD.sub(lambda found: f":{found[1]} {found[2].replace(', ', '/')}:", line) for line in lines]


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _join, priority=900)  # after napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
