"""The rules of the settings that say how often something happens."""

import re
from typing import Annotated, Any

from ..fields import Rule, is_int, is_positive_int, read_flag

_SECONDS = {"s": 1, "min": 60, "h": 3600}


def seconds_of(text: str) -> float | None:
    """Convert a time such as '90s', '15min' or '1.5h' to seconds; return None for other text."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(s|min|h)", text)
    return float(found[1]) * _SECONDS[found[2]] or None if found else None


Every = Annotated[
    int | str,
    Rule(
        lambda v: is_positive_int(v) or (isinstance(v, str) and seconds_of(v) is not None),
        "a positive number of updates, or a time such as '90s', '15min' or '2h'",
    ),
]


def _read_share(value: Any) -> Any:
    """Convert text to a number of updates ("200") or a share ("25%", "0.25"), and return any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        if value.endswith("%"):
            return float(value[:-1]) / 100
        return int(value) if value.isdecimal() else float(value)
    except ValueError:
        return value


EvaluateEvery = Annotated[
    int | float | str,  # str on the command line; `_read_share` parses it
    Rule(
        lambda v: is_positive_int(v) or (isinstance(v, float) and 0 < v <= 1),
        "a positive number of updates, or a share of an epoch above 0 and up to 1, such as 0.25 or '25%'",
        _read_share,
    ),
]


def _read_audit(value: Any) -> Any:
    """Parse a flag or a number from text, and return any other value unchanged."""
    found = read_flag(value)
    return int(found) if isinstance(found, str) and found.isdecimal() else found


NoiseScale = Annotated[
    int | str,  # `_read_audit` parses a number or False from text
    Rule(
        lambda v: v is False or v == "auto" or (is_int(v) and v > 0),
        "'auto', False, or a positive number of updates",
        _read_audit,
    ),
]

Audit = Annotated[
    int | str,  # str on the command line; `_read_audit` parses it
    Rule(
        lambda v: isinstance(v, bool) or (is_int(v) and v > 1),
        "True, False, or a number of updates that is at least 2",
        _read_audit,
    ),
]
