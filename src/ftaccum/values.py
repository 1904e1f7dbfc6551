"""Values that users give: as Python's own numbers and strings, and short enough for a message."""

import numbers
import os
import reprlib
from typing import Any

LARGEST = 2**63 - 1  # of NumPy's and torch's integers


class _Shown(reprlib.Repr):
    """Shows values in messages: cuts long ones in the middle, and names those that cannot be shown."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200
        self.maxlist = self.maxtuple = 20

    def repr_int(self, x: int, level: int) -> str:  # noqa: ARG002
        return repr(x) if abs(x) <= LARGEST else "too large an integer"


shown = _Shown().repr


def plain(value: Any) -> Any:
    """Return NumPy's numbers as Python's and paths as strings, and any other value unchanged."""
    try:
        return _plain(value)
    except Exception:  # a list that holds itself, a fraction beyond all floats, a tensor without storage, …
        return value


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if hasattr(value, "tolist"):  # a NumPy array
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else value
