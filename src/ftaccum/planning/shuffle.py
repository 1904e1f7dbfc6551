"""Random choices that depend only on the seed: the rows to hold out, and the order of each epoch."""

from collections.abc import Sequence

import numpy as np

from ..errors import SettingsError
from .micro_batches import RowIndices

# One number for each use of the seed, so that no two uses draw the same numbers.
_HOLD_OUT, _EPOCH, _BALANCED = 0, 1, 2


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


def balanced_order_of(epoch: int, classes: Sequence[int], seed: int) -> list[int]:
    """Return the positions that an epoch (from 0) draws, as many as there are rows, with replacement.

    Each draw takes a class with equal probability, and then a row of that class with equal probability.

    Args:
        classes: the class of each row, from 0 on; -1 for rows that are never drawn.
    """
    draw, of_rows = _generator(seed, _BALANCED, epoch), np.asarray(classes)
    by_class = np.argsort(of_rows, kind="stable")
    n_without, *sizes = np.bincount(of_rows + 1)
    starts = n_without + np.cumsum([0, *sizes[:-1]])
    drawn = draw.randint(len(sizes), size=len(of_rows), dtype=np.int64)
    places = starts[drawn] + draw.randint(np.asarray(sizes)[drawn], dtype=np.int64)
    return by_class[places].tolist()


def _permutation(n: int, *seed: int) -> np.ndarray:
    return _generator(*seed).permutation(n)


def _generator(*seed: int) -> np.random.RandomState:
    # NumPy's newer generators may give other numbers in another version. The legacy one is frozen, so that a run can be
    # resumed after an upgrade.
    return np.random.RandomState(seed)
