"""The weights of rows in the mean that a loss takes, measured from their losses in one batch and alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .sample import RowGroup

_REPEATS = 16  # of a row, at most, to weigh it against a heavier one
_ROUNDING = 5e-7  # of a loss, relative; a few units in the last place of float32, in which many heads compute
_DIGITS = 3  # at most, of a round weight
_CLOSE = 0.01  # of a unit in the last digit; a weight with a larger error is near a round number by chance
_CERTAIN = 1e-3  # relative; a weight with a larger error is too uncertain to use


@dataclass(frozen=True)
class Weights:
    """The weights of some rows or values in a mean.

    Attributes:
        values: the weights, relative to one of them. A weight that cannot be measured is not finite.
        errors: how far rounding may put each weight off.
    """

    values: np.ndarray
    errors: np.ndarray

    def relative_to(self, unit: int) -> "Weights":
        """Return the same weights in units of one of them."""
        with np.errstate(divide="ignore", invalid="ignore"):
            values = self.values / self.values[unit]
            errors = (self.errors + np.abs(values) * self.errors[unit]) / self.values[unit]
        errors[unit] = 0.0 if np.isfinite(values[unit]) else np.inf
        return Weights(values, errors)

    def rounded(self) -> "Weights":
        """Return round weights where these are within the error, in a unit in which all are round if there is one."""
        in_units = (self.relative_to(unit) for unit in np.flatnonzero(self.values > 0).tolist())
        every = [self._rounded(), *(weights._rounded() for weights in in_units)]
        return next((weights for weights in every if not weights.errors[weights.values > 0].any()), every[0])

    @property
    def are_certain(self) -> bool:
        """Whether all errors are small, those of weights of 0 in comparison with the smallest other weight."""
        smallest = self.values[self.values > 0].min(initial=np.inf)
        return bool((self.errors <= _CERTAIN * np.maximum(self.values, smallest)).all())

    def _rounded(self) -> "Weights":
        values, errors = self.values.copy(), self.errors.copy()
        last_digit = 10.0 ** np.floor(np.log10(np.where(values > 0, values, 1.0)))
        for digits in range(_DIGITS, 0, -1):
            rounded = np.array([float(f"{weight:.{digits}g}") for weight in self.values])
            unit = last_digit / 10 ** (digits - 1)
            fits = (np.abs(rounded - self.values) <= self.errors) & (self.errors <= _CLOSE * unit) & (rounded > 0)
            values, errors = np.where(fits, rounded, values), np.where(fits, 0.0, errors)
        return Weights(values, errors)


def weigh_rows(loss: Callable[[Sequence[int]], float], group: RowGroup) -> Weights:
    """Return the weights of N rows, relative to the first row, or to another one if the first weighs nothing.

    Two rows with nearly the same loss hardly show their weights. So all rows are compared with the one whose loss is
    farthest from the nearest loss of another row.

    Args:
        loss: returns the loss of some of the rows in one batch. A row may be repeated.
        group: the rows.
    """
    alone_N = np.array([loss([n]) for n in range(len(group.names))])
    with np.errstate(invalid="ignore"):
        gaps_NN = np.abs(alone_N[:, None] - alone_N)
    np.fill_diagonal(gaps_NN, np.inf)
    counted = np.flatnonzero(np.isfinite(alone_N)).tolist()  # a row without a finite loss has no item that counts
    reference = max(counted, key=lambda n: gaps_NN[n, counted].min(), default=0)
    values_N, errors_N = np.zeros_like(alone_N), np.zeros_like(alone_N)
    for n in counted:
        values_N[n], errors_N[n] = (1.0, 0.0) if n == reference else _weight(loss, alone_N, reference, n)
    return Weights(values_N, errors_N).relative_to(0 if values_N[0] > errors_N[0] else reference)


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
    errors_N = np.concatenate([each.errors for each in weights])
    is_comparable = len(weights) == 1 or all(each.values[0] > 0 for each in weights)
    is_known = np.isfinite(wanted_N + errors_N).all() and np.linalg.matrix_rank(counts_NV) == counts_NV.shape[1]
    if not (is_comparable and is_known and (wanted_N > 0).any()):
        return None
    errors_N += _ROUNDING * np.maximum(np.abs(wanted_N), wanted_N[wanted_N > 0].min())
    inverse_VN = np.linalg.pinv(counts_NV / errors_N[:, None])  # rows with larger errors count for less
    values_V, errors_V = inverse_VN @ (wanted_N / errors_N), np.abs(inverse_VN).sum(1)
    values_V = np.where(np.abs(values_V) <= errors_V, 0.0, values_V)
    if (values_V < 0).any() or not values_V.any():
        return None
    return Weights(values_V, errors_V).relative_to(int(np.where(values_V > 0, counts_NV.sum(0), 0).argmax()))


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
