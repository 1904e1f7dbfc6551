"""The effects of habits in words, for reports and for docs/teaching/large_batch.md."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from .habit_loop import HABITS

NO_EFFECT, NOT_MEASURED = "no effect", "not measured"
_NOISE = 0.05  # of a peak on a CPU; one of about 60 runs was off by more than 2%


def memory_effects(peaks: Mapping[str, float | None]) -> dict[str, str]:
    """Return how each habit changes a peak, given the peaks of the loops. None means that none was measured."""
    return {habit: _memory_effect(peaks[has], peaks[has_not]) for habit, (has, has_not) in HABITS.items()}


def time_effects(seconds: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """Return how each habit changes the median time, given the times of the loops in several rounds.

    If the ranges of the rounds overlap, that is no effect.
    """
    return {habit: _time_effect(seconds[has], seconds[has_not]) for habit, (has, has_not) in HABITS.items()}


def gpu_columns(file: Path) -> dict[str, dict[str, str]]:
    """Return the columns that `scripts/gpu_check --json FILE` has measured; "not measured" without a file or a GPU."""
    part = json.loads(file.read_text())["parts"].get("memory habits", {}) if file.exists() else {}
    if part.get("peak", {}).get("plain") is None:
        not_measured = dict.fromkeys(HABITS, NOT_MEASURED)
        return {"peak, GPU": not_measured, "reserved, GPU": not_measured, "time, GPU": not_measured}
    return {
        "peak, GPU": memory_effects(part["peak"]),
        "reserved, GPU": memory_effects(part["reserved"]),
        "time, GPU": time_effects(part["seconds"]),
    }


def _memory_effect(has: float | None, has_not: float | None) -> str:
    if has is None or has_not is None:
        return NOT_MEASURED
    change = has / has_not - 1
    return NO_EFFECT if abs(change) < _NOISE else f"{change:+.0%}"


def _time_effect(has: Sequence[float], has_not: Sequence[float]) -> str:
    overlap = min(has) <= max(has_not) and min(has_not) <= max(has)
    return NO_EFFECT if overlap else f"{median(has) / median(has_not) - 1:+.0%}"
