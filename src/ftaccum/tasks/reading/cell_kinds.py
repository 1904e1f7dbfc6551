"""Whether the cells of a CSV column are whole numbers, numbers, true or false, or text."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

TEXT = "text"
# At most 18 digits, which 64 bits hold. Numbers with leading zeros, such as 007, are names.
_WHOLE = "(?:0|[1-9][0-9]{0,17})"
_MATCH: dict[str, Callable[[str], Any]] = {
    "bool": re.compile("true|false|True|False|TRUE|FALSE").fullmatch,
    "int": re.compile(rf" *-?{_WHOLE} *").fullmatch,
    "float": re.compile(rf" *-?(?:{_WHOLE}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,3}})? *").fullmatch,
}
_WIDER = {"": ("bool", "int", "float"), "bool": ("bool",), "int": ("int", "float"), "float": ("float",), TEXT: ()}
_TYPES = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), TEXT: pa.string()}
_READ: dict[str, Callable[[str], Any]] = {
    "bool": lambda cell: cell.lower() == "true", "int": int, "float": float, TEXT: str,
}  # fmt: skip
WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", TEXT: TEXT}


def widened(kind: str, cells: Sequence[str]) -> str:
    """Return the kind of a column that also has these cells: the narrowest that reads all of them.

    Args:
        kind: the kind so far; empty if all cells so far are empty.
        cells: more cells. Empty ones are missing values and fit any kind.
    """
    filled = [cell for cell in cells if cell]
    if not filled:
        return kind
    return next((wider for wider in _WIDER[kind] if all(map(_MATCH[wider], filled))), TEXT)


def first_other(kind: str, cells: Sequence[str]) -> int | None:
    """Return the position of the first cell that is not of a kind; None if all are."""
    if kind in ("", TEXT):
        return None
    return next((n for n, cell in enumerate(cells) if cell and not _MATCH[kind](cell)), None)


def kind_of_type(type_: pa.DataType) -> str:
    return next(kind for kind, each in _TYPES.items() if each == type_)


def arrow_type(kind: str) -> pa.DataType:
    return _TYPES[kind or TEXT]


def as_array(kind: str, cells: Sequence[str]) -> pa.Array:
    """Return the values of cells as an Arrow array; empty cells are null."""
    read = _READ[kind or TEXT]
    return pa.array([read(cell) if cell else None for cell in cells], _TYPES[kind or TEXT])
