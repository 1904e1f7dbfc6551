"""The work and the times of updates in a ledger, and the speed that follows from them."""

import math
from collections.abc import Sequence

import numpy as np

from .ledger import Ledger, WindowEntry


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
    return [getattr(w, unit) / w.seconds if w.seconds > 0 else math.nan for w in windows]


def mean_speed(windows: Sequence[WindowEntry], unit: str) -> float:
    """Return the tokens or rows per second of all updates whose times are known; NaN if there are none."""
    timed = [w for w in windows if w.seconds > 0]
    return sum(getattr(w, unit) for w in timed) / sum(w.seconds for w in timed) if timed else math.nan


def padding_share(windows: Sequence[WindowEntry]) -> float | None:
    """Return the share of padding in the token positions of updates; None if their rows have no tokens."""
    positions = sum(w.positions for w in windows)
    return 1 - sum(w.tokens for w in windows) / positions if positions else None
