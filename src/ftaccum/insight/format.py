"""Numbers and durations as short texts, the same in tables, reports and model cards."""

import math

UNKNOWN = "–"
_UNITS = ("B", "kB", "MB", "GB", "TB")


def format_number(value: float | None) -> str:
    """Return a loss or a metric with four decimals; a very small or large one with four digits, and None as a dash."""
    if value is None:
        return UNKNOWN
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e6 or not value else f"{value:.4g}"


def known(value: float) -> float | None:
    """Return None for NaN, which stands for a loss that has not been measured."""
    return None if math.isnan(value) else value


def format_bytes(n_bytes: float) -> str:
    """Return a number of bytes with a unit, such as 1.25 GB (10⁹ bytes)."""
    for unit in _UNITS:
        if n_bytes < 999.5 or unit == _UNITS[-1]:
            break
        n_bytes /= 1000
    return f"{n_bytes:.3g} {unit}"


def format_duration(seconds: float) -> str:
    """Return a duration in seconds, in minutes from 100 s, and in hours from 100 minutes."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
