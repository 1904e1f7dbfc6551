"""How the reference shows docstrings.

- An entry may describe several arguments or attributes, as in `train_data, val_data: the rows`. Sphinx takes all but
  the last of these names for a type, so they are joined by slashes.
- Attributes have the heading "Attributes" instead of "Variables".
- An indented block is shown as it is, such as a formula or an example.
- The pages that an entry names, such as docs/tasks.md, are links.
- Defaults in signatures are shown as numbers.
- Records that ftaccum makes, and users only read, are shown without the arguments of their constructor.
"""

import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.domains.python import PyObject

_FIELD = re.compile(r"^:(ivar|param) ([\\\w]+(?:, [\\\w]+)+):")
_PAGE = re.compile(r"`{0,2}\bdocs/(\w+)\.md`{0,2}")
_RECORDS = ("ftaccum.Result", "ftaccum.Plan", "ftaccum.Verification")


def _adapt_docstring(_app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    joined = (_FIELD.sub(lambda found: f":{found[1]} {found[2].replace(', ', '/')}:", line) for line in lines)
    lines[:] = [_PAGE.sub(r":doc:`/\1`", line) for line in joined]
    for n in reversed(range(len(lines) - 2)):
        if re.match(r"[^\s:.*-].*(?<!::)$", lines[n]) and not lines[n + 1] and lines[n + 2].startswith("    "):
            lines[n + 1 : n + 1] = ["", "::"]


def _adapt_signature(
    _app: Sphinx, _what: str, name: str, _object: Any, _options: Any, arguments: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    if name in _RECORDS:
        return "", ""
    return (re.sub(r"DefaultFloat\((.*?)\)", r"\1", arguments), returns) if arguments else None


def setup(app: Sphinx) -> dict[str, Any]:
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("autodoc-process-docstring", _adapt_docstring, priority=900)  # after napoleon
    app.connect("autodoc-process-signature", _adapt_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
