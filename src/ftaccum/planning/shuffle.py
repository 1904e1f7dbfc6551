"""What the seed settles: which rows are held out, and the order of an epoch."""

import numpy as np

from ..errors import SettingsError
from .micro_batches import RowIndices

# One number for each use of the seed, so that no two uses draw the same permutation.
_HOLD_OUT, _EPOCH = 0, 1


def n_held_out(n_rows: int, share: float) -> int:
    """Rows that are held out: `share × n_rows`, rounded, and at least one where `share` is above 0.

    Raises:
        SettingsError: where nothing would be left to train on.
    """
    n_held = max(1, round(share * n_rows)) if share else 0
    if n_rows <= n_held:
        raise SettingsError(
            [f"`validation_split` {share} of {n_rows} rows leaves none to train on. Give more rows, or a split of 0."]
        )
    return n_held


def hold_out(n_rows: int, share: float, seed: int) -> tuple[RowIndices, RowIndices]:
    """Splits row positions into (training, validation) by the seed, each in ascending order.

    Raises:
        SettingsError: where nothing would be left to train on.
    """
    n_held = n_held_out(n_rows, share)
    order = _permutation(n_rows, seed, _HOLD_OUT)
    held, kept = np.sort(order[:n_held]), np.sort(order[n_held:])
    return tuple(kept.tolist()), tuple(held.tolist())


def order_of(epoch: int, n_rows: int, seed: int) -> list[int]:
    """The positions of all rows, in the order of an epoch."""
    return _permutation(n_rows, seed, _EPOCH, epoch).tolist()


def _permutation(n: int, *seed: int) -> np.ndarray:
    # NumPy's newer generators may change their stream between versions; the legacy one is frozen, and a run must
    # find its rows again after an upgrade.
    return np.random.RandomState(seed).permutation(n)
