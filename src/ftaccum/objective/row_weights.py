"""The weights of rows in the mean that a loss takes, measured from their losses in one batch and alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .sample import RowGroup

_REPEATS = 16  # of a row, at most, to weigh it against a heavier one
_NOTHING = 1e-6  # relative; a smaller weight counts as 0
_ROUNDING = 5e-7  # of a loss, relative; a few units in the last place of float32, in which many heads compute


@dataclass(frozen=True)
class Weights:
    """The weights of some rows or values in a mean.

    Attributes:
        values: the weights, relative to one of them. A weight that cannot be measured is not finite.
        errors: how far rounding may put each weight off.
    """

    values: np.ndarray
    errors: np.ndarray


def weigh_rows(loss: Callable[[Sequence[int]], float], group: RowGroup) -> Weights:
    """Return the weights of N rows, relative to the first row, or to another one if the first weighs nothing.

    Two rows with nearly the same loss hardly show their weights. So all rows are compared with the one whose loss is
    farthest from the nearest loss of another row.

    Args:
        loss: returns the loss of some of the rows in one batch. A row may be repeated.
        group: the rows.
    """
    alone_N = np.array([loss([n]) for n in range(len(group.names))])
    gaps_NN = np.abs(alone_N[:, None] - alone_N)
    np.fill_diagonal(gaps_NN, np.inf)
    counted = np.flatnonzero(np.isfinite(alone_N)).tolist()  # a row without a finite loss has no item that counts
    reference = max(counted, key=lambda n: gaps_NN[n, counted].min(), default=0)
    values_N, errors_N = np.zeros_like(alone_N), np.zeros_like(alone_N)
    for n in counted:
        values_N[n], errors_N[n] = (1.0, 0.0) if n == reference else _weight(loss, alone_N, reference, n)
    unit = 0 if values_N[0] > _NOTHING else reference
    with np.errstate(divide="ignore", invalid="ignore"):
        relative_N = values_N / values_N[unit]
        return Weights(relative_N, (errors_N + relative_N * errors_N[unit]) / values_N[unit])


def weigh_values(weights: Sequence[Weights], counts_NV: np.ndarray) -> Weights | None:
    """Return the weights of V values that explain the weights of N rows.

    Args:
        weights: the weights of the rows of each group. All groups have the same first row.
        counts_NV: how often row n has value v.

    Returns:
        The weights, relative to that of the most frequent value whose weight is not 0; None if the rows do not
        determine them.
    """
    wanted_N = np.concatenate([each.values for each in weights])
    errors_N = np.concatenate([each.errors for each in weights]) + _ROUNDING * np.abs(wanted_N) + _ROUNDING
    is_comparable = len(weights) == 1 or all(each.values[0] > _NOTHING for each in weights)
    is_known = np.isfinite(wanted_N + errors_N).all() and np.linalg.matrix_rank(counts_NV) == counts_NV.shape[1]
    if not (is_comparable and is_known):
        return None
    inverse_VN = np.linalg.pinv(counts_NV / errors_N[:, None])  # rows with larger errors count for less
    values_V, errors_V = inverse_VN @ (wanted_N / errors_N), np.abs(inverse_VN).sum(1)
    values_V = np.where(np.abs(values_V) < np.maximum(errors_V, _NOTHING * values_V.max()), 0.0, values_V)
    if (values_V < 0).any() or not values_V.any():
        return None
    common = values_V[np.where(values_V > 0, counts_NV.sum(0), 0).argmax()]
    return Weights(values_V / common, errors_V / common)


def _weight(loss: Callable[[Sequence[int]], float], alone_N: np.ndarray, reference: int, n: int) -> tuple[float, float]:
    """Return the weight of row n relative to the reference row r, w_n / w_r, and its error.

    It solves  m(k · row r ∪ row n) = (k · w_r · m(row r) + w_n · m(row n)) / (k · w_r + w_n).
    """
    of_reference, alone = alone_N[reference], alone_N[n]
    weight = 1.0
    for _ in range(2):  # the second time with about equal weight on both rows, where rounding matters least
        times, times_n = (int(np.clip(np.rint(w), 1, _REPEATS)) for w in (weight, 1 / max(weight, 1e-9)))
        both = loss([reference] * times + [n] * times_n)
        if both == alone or not np.isfinite(both):
            return np.inf, np.inf
        weight = times / times_n * (of_reference - both) / (both - alone)
    size = _ROUNDING * (abs(of_reference) + abs(both) + abs(alone))
    off = size * times / times_n * (1 / abs(both - alone)) * (1 + abs(of_reference - both) / abs(both - alone))
    return weight, off
