"""Names as parts of Markdown: metrics, labels and files, whose names may have any characters."""

import re
import unicodedata

# In the middle of a word, `_` is no markup in GitHub's Markdown, and names of metrics have many.
_MARKUP = re.compile(r"[\\`*<>$\[\]~&]|(?<![^\W_])_|_(?![^\W_])")


def escape(name: str) -> str:
    """Return a name that Markdown shows as it is, in one line."""
    return _MARKUP.sub(r"\\\g<0>", _in_one_line(name))


def code(name: str) -> str:
    """Return a name as code, in one line. A backtick, which would end it, becomes an apostrophe."""
    return f"`{_in_one_line(name).replace('`', chr(39))}`"


def without_control_characters(text: str) -> str:
    """Return a text without control characters except line breaks and tabs, and without halves of surrogate pairs."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


def _in_one_line(name: str) -> str:
    return " ".join(without_control_characters(name).split())
