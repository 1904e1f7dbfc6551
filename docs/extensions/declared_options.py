"""The options of a command on the site, from the same declarations as its `--help-all`.

    ```{options} preview
    :besides: train
    ```

`besides` names commands whose options are left out.
"""

import re
from dataclasses import Field, fields
from typing import Any

from sphinx.application import Sphinx

from ftaccum.apps.help import by_group, default_text, usage_of
from ftaccum.apps.options import OPTIONS

_DIRECTIVE = re.compile(r"^```\{options\} (\w+)\n(?::besides: (\w+)\n)?```$", re.MULTILINE)
_HEAD = "| option | default | meaning |\n| --- | --- | --- |\n"


def options_by_group(command: str, besides: str | None = None) -> str:
    """Return a heading and a table for each group of a command's options.

    Args:
        command: the command.
        besides: a command whose options are left out.
    """
    left_out = OPTIONS[besides] if besides else []
    declared = {f.name: f for kind in OPTIONS[command] if kind not in left_out for f in fields(kind)}
    groups = by_group(declared).items()
    return "\n".join(f"### {title.capitalize()}\n\n{_HEAD}{''.join(map(_row, options))}" for title, options in groups)


def _row(option: Field) -> str:
    default = default_text(option)
    cells = (_code(usage_of(option)), _code(default) if default else "", _escaped(option.metadata["help"]))
    return f"| {' | '.join(cells)} |\n"


def _code(text: str) -> str:
    return f"`{text.replace('|', chr(92) + '|')}`"


def _escaped(text: str) -> str:
    """Escape the marks of Markdown outside the code spans of a help text, and link the pages that it names."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([\\|*<\[\]])", r"\\\1", part) for part in parts[::2]]
    return re.sub(r"`docs/(\w+\.md)`", r"[\1](../\1)", "`".join(parts))


def _read(_app: Sphinx, _docname: str, source: list[str]) -> None:
    source[0] = _DIRECTIVE.sub(lambda found: options_by_group(*found.groups()), source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
