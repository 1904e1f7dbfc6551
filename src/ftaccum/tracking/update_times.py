"""The work and the times of updates in a ledger, and the speed that follows from them."""

import math
from collections.abc import Sequence

import numpy as np

from .ledger import Ledger, WindowEntry
from .throughput import Throughput


def seconds_by_use(ledger: Ledger) -> dict[str, float]:
    """Return the time of all updates and their audits by its use. It is empty if no update has times."""
    parts = {"data": "data_seconds", "forward and backward": "pass_seconds", "optimizer": "optimizer_seconds"}
    times = np.array([[getattr(w, name) for name in parts.values()] for w in ledger.windows]).reshape(-1, len(parts))
    if not np.isfinite(times).any():
        return {}
    seconds = dict(zip(parts, np.nansum(times, 0).tolist(), strict=True))
    return seconds | ({"audits": sum(a.seconds for a in ledger.audits)} if ledger.audits else {})


def speeds(windows: Sequence[WindowEntry], unit: str) -> list[float]:
    """Return the tokens or rows per second of each update, without audits; NaN where its times are not known.

    Args:
        windows: the updates.
        unit: "tokens" or "rows".
    """
    return [getattr(w, unit) / time if (time := _seconds(w)) > 0 else math.nan for w in windows]


def mean_speed(windows: Sequence[WindowEntry], unit: str) -> float:
    """Return the tokens or rows per second of all updates whose times are known; NaN if there are none."""
    timed = [(getattr(w, unit), time) for w in windows if (time := _seconds(w)) > 0]
    return sum(done for done, _ in timed) / sum(time for _, time in timed) if timed else math.nan


def work_of(windows: Sequence[WindowEntry]) -> Throughput:
    """Return the rows, tokens and positions of updates."""
    return Throughput(*(sum(getattr(w, name) for w in windows) for name in ("rows", "tokens", "positions")))


def _seconds(window: WindowEntry) -> float:
    return window.data_seconds + window.pass_seconds + window.optimizer_seconds
