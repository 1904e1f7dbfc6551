"""What rows weigh in the mean that a loss takes, measured from their losses together and alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .sample import RowGroup

_REPEATS = 16  # of a row, to weigh it against one that weighs more
_NOTHING = 1e-6  # a weight that is 0, relative to others
_ROUNDING = 5e-7  # of a loss, relative: a few units in the last place of float32, which many heads compute in


@dataclass(frozen=True)
class Weights:
    """What each of some rows or values weighs in a mean.

    Attributes:
        values: relative to one of them. Not finite where they cannot be measured.
        errors: how far these may be off through rounding.
    """

    values: np.ndarray
    errors: np.ndarray


def weigh_rows(loss: Callable[[Sequence[int]], float], group: RowGroup) -> Weights:
    """Return what N rows weigh, relative to the first, or to another where the first weighs nothing.

    Rows of nearly the same loss hardly show what they weigh, so all are compared with the row whose loss is the
    farthest from that of its nearest.

    Args:
        loss: the mean over some of the rows, which may come more than once.
    """
    alone_N = np.array([loss([n]) for n in range(len(group.names))])
    gaps_NN = np.abs(alone_N[:, None] - alone_N)
    np.fill_diagonal(gaps_NN, np.inf)
    counted = np.flatnonzero(np.isfinite(alone_N)).tolist()  # a row without a loss has no item that counts
    reference = max(counted, key=lambda n: gaps_NN[n, counted].min(), default=0)
    values_N, errors_N = np.zeros_like(alone_N), np.zeros_like(alone_N)
    for n in counted:
        values_N[n], errors_N[n] = (1.0, 0.0) if n == reference else _weight(loss, alone_N, reference, n)
    unit = 0 if values_N[0] > _NOTHING else reference
    with np.errstate(divide="ignore", invalid="ignore"):
        relative_N = values_N / values_N[unit]
        return Weights(relative_N, (errors_N + relative_N * errors_N[unit]) / values_N[unit])


def weigh_values(weights: Sequence[Weights], counts_NV: np.ndarray) -> Weights | None:
    """Return the weights of V values that make the rows weigh as they do, relative to the most common that weighs.

    Args:
        weights: of the rows of each group. All groups have the same first row.
        counts_NV: how often each row has each value.

    Returns:
        None where the rows do not tell.
    """
    wanted_N = np.concatenate([each.values for each in weights])
    errors_N = np.concatenate([each.errors for each in weights]) + _ROUNDING * np.abs(wanted_N) + _ROUNDING
    is_comparable = len(weights) == 1 or all(each.values[0] > _NOTHING for each in weights)
    is_known = np.isfinite(wanted_N + errors_N).all() and np.linalg.matrix_rank(counts_NV) == counts_NV.shape[1]
    if not (is_comparable and is_known):
        return None
    inverse_VN = np.linalg.pinv(counts_NV / errors_N[:, None])  # so that rows count for less that are known less well
    values_V, errors_V = inverse_VN @ (wanted_N / errors_N), np.abs(inverse_VN).sum(1)
    values_V = np.where(np.abs(values_V) < np.maximum(errors_V, _NOTHING * values_V.max()), 0.0, values_V)
    if (values_V < 0).any() or not values_V.any():
        return None
    common = values_V[np.where(values_V > 0, counts_NV.sum(0), 0).argmax()]
    return Weights(values_V / common, errors_V / common)


def _weight(loss: Callable[[Sequence[int]], float], alone_N: np.ndarray, reference: int, n: int) -> tuple[float, float]:
    """Return w_n / w_r and its error.

    It follows from  m(k · row r ∪ row n) = (k · w_r · m(row r) + w_n · m(row n)) / (k · w_r + w_n).
    """
    of_reference, alone = alone_N[reference], alone_N[n]
    weight = 1.0
    for _ in range(2):  # the second time with about as much of one as of the other, which rounding hurts least
        times, times_n = (int(np.clip(np.rint(w), 1, _REPEATS)) for w in (weight, 1 / max(weight, 1e-9)))
        both = loss([reference] * times + [n] * times_n)
        if both == alone or not np.isfinite(both):
            return np.inf, np.inf
        weight = times / times_n * (of_reference - both) / (both - alone)
    size = _ROUNDING * (abs(of_reference) + abs(both) + abs(alone))
    off = size * times / times_n * (1 / abs(both - alone)) * (1 + abs(of_reference - both) / abs(both - alone))
    return weight, off
