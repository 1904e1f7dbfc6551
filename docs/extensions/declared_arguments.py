"""The tables of docs/arguments.md, from the declarations of the settings.

A row of `Recipe` or `Runtime` has the default and the help of its field in `src/ftaccum/settings/`, in the table of
its group. Rows of components, which are not declared there, stay as they are. The site always has the rows as
declared. Run this file to write them to docs/arguments.md.
"""

import json
import re
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from ftaccum.fields import traits_of
from ftaccum.settings.recipe import Recipe
from ftaccum.settings.runtime import Runtime

_TABLE = re.compile(r"^## (?P<heading>.*)\n(?:(?!^#|^\|).*\n)*?\| argument .*\n\| ---.*\n(?P<rows>(?:\|.*\n?)*)", re.M)
_NAME = re.compile(r"\| `(\w+)`")


def with_declared_rows(page: str) -> str:
    """Return the page of arguments with the rows of settings as they are declared.

    A row keeps its place. A new setting comes last in the table of its group.
    """
    declared = {f.name: (f, kind.__name__) for kind in (Recipe, Runtime) for f in fields(kind)}

    def rewrite(table: re.Match[str]) -> str:
        group = table["heading"].lower()
        rows = {_NAME.match(row).group(1): row for row in table["rows"].splitlines()}
        here = {name: _row(*of) for name, of in declared.items() if traits_of(of[0]).group == group}
        kept = {name: row for name, row in rows.items() if name in here or row.endswith("| Component |")}
        text = "\n".join((kept | here).values()) + "\n"
        return table.group().removesuffix(table["rows"]) + text

    return _TABLE.sub(rewrite, page)


def _row(declared: Field, kind: str) -> str:
    meaning = declared.metadata["help"].replace("|", "\\|")
    return f"| `{declared.name}` | {_default(declared.default)} | {meaning} | {kind} |"


def _default(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value)
    return re.sub(r"e-0(\d)$", r"e-\1", repr(value))


def _read(_app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == "arguments":
        source[0] = with_declared_rows(source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    page = Path(__file__).parent.parent / "arguments.md"
    page.write_text(with_declared_rows(page.read_text(encoding="utf-8")), encoding="utf-8")
