"""The words for an estimate of the gradient noise scale, for results, reports, model cards and `ftaccum advise`."""

import math
from collections.abc import Mapping
from typing import Any

_NOISE, _SIGNAL = 0.2, 0.8  # shares of the signal below and above which there is advice


def is_known(summary: Mapping[str, Any]) -> bool:
    """Return whether an estimate, as `noise_scale.summarize` returns it, says anything."""
    return not math.isnan(summary["signal_share_lower"])


def is_bounded(summary: Mapping[str, Any]) -> bool:
    """Return whether the interval excludes that there is no signal at all."""
    return bool(summary["signal_share_lower"] > 0)


def describe_scale(summary: Mapping[str, Any], unit: str = "rows") -> str:
    """Return a known noise scale with its 90% interval, or its lower bound if it has no upper one.

    Args:
        unit: "rows" or "tokens".
    """
    found, low, high = (summary[f"noise_{unit}{end}"] for end in ("", "_lower", "_upper"))
    if not is_bounded(summary):
        return f"at least {rounded(low)} {unit}"
    return f"{rounded(found)} {unit} (90% interval: {rounded(low)} to {rounded(high)})"


def describe_noise(summary: Mapping[str, Any]) -> str:
    """Return an estimate, known or not, and what it means for the batch, in one line."""
    rows, n = summary["rows"], summary["measured_updates"]
    low, high = summary["signal_share_lower"], summary["signal_share_upper"]
    if not is_known(summary):
        return f"not known yet (measured in {n} updates of {rows} rows)"
    if high < _NOISE:
        advice = f"updates are mostly noise: twice the rows make one {2 / (1 + high):.1f} times as useful or more"
    elif low > _SIGNAL:
        advice = f"rows mostly agree: half the rows would be {1 / (2 - low):.0%} as useful or more"
    else:
        worth = list(dict.fromkeys(f"{2 / (1 + share):.1f}" for share in (high, low)))
        advice = f"twice the rows make one {' to '.join(worth)} times as useful"
    return f"{describe_scale(summary)}; an update has {rows:,} rows, and {advice} (docs/noise_scale.md)"


def rounded(number: float) -> str:
    """Return a number with two digits, and zeros after them."""
    if not 10 <= number < math.inf:
        return f"{number:.2g}"
    return f"{round(number, 1 - math.floor(math.log10(number))):,.0f}"
