"""Random choices that depend only on the seed: the rows to hold out, and the order of each epoch."""

import numpy as np

from ..errors import SettingsError
from .micro_batches import RowIndices

# One number for each use of the seed, so that no two uses draw the same permutation.
_HOLD_OUT, _EPOCH = 0, 1


def n_held_out(n_rows: int, share: float) -> int:
    """Return the number of rows to hold out: `share × n_rows`, rounded, and at least one if `share` is above 0.

    Raises:
        SettingsError: if no row would be left to train on.
    """
    n_held = max(1, round(share * n_rows)) if share else 0
    if n_rows <= n_held:
        raise SettingsError(
            [f"`validation_split` is {share}, which leaves none of {n_rows} rows to train on. Add rows or set it to 0."]
        )
    return n_held


def hold_out(n_rows: int, share: float, seed: int) -> tuple[RowIndices, RowIndices]:
    """Split row positions into (training, validation) by the seed, each in ascending order.

    Raises:
        SettingsError: if no row would be left to train on.
    """
    n_held = n_held_out(n_rows, share)
    order = _permutation(n_rows, seed, _HOLD_OUT)
    held, kept = np.sort(order[:n_held]), np.sort(order[n_held:])
    return tuple(kept.tolist()), tuple(held.tolist())


def order_of(epoch: int, n_rows: int, seed: int) -> list[int]:
    """Return the positions of all rows, in the order of an epoch (from 0)."""
    return _permutation(n_rows, seed, _EPOCH, epoch).tolist()


def _permutation(n: int, *seed: int) -> np.ndarray:
    # NumPy's newer generators may give other numbers in another version. The legacy one is frozen, so that a run can be
    # resumed after an upgrade.
    return np.random.RandomState(seed).permutation(n)
