"""The gradient noise scale: the number of rows at which the noise in a gradient is as large as its signal.

The gradient of an update of R rows is the true gradient μ plus noise: E|g|² = |μ|² · (1 + B / R). B is the noise scale
in rows, B_simple = tr(Σ) / |G|² in McCandlish et al. 2018 (arXiv:1812.06162), where G is μ and Σ the covariance of the
gradient of one row. ρ = |μ|² / E|g|² = 1 / (1 + B / R) is the signal's share in the gradient. A measured update yields
two numbers: its agreement P, the product of the gradients of two random halves of its rows, has the mean |μ|²; its
power Q is |g|². So ρ is estimated by ΣwP / ΣwQ, with weights that favor recent updates.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..planning.halves import LEAST_MEASURED
from .student_t import t_quantile

# Measured updates after which the weight of an update is 1/e. The effective number of updates is then about 100, with
# which the standard error of |μ|² is 7% in simulated runs.
_MEMORY = 50.0
_LEVEL = 0.9  # of the interval


@dataclass(frozen=True)
class NoiseEstimate:
    """The estimate after some measured updates. All numbers are NaN while nothing is known.

    If `signal_share_lower` is 0, the noise scale has only a lower end: `noise_rows_upper` is infinite, `noise_rows` and
    `noise_rows_of_data` are NaN, and so is `signal_share` unless the estimate is positive.

    Attributes:
        signal_share: the signal's share ρ in the gradient of an update, above 0 and at most 1.
        signal_share_lower, signal_share_upper: its 90% interval, cut to 0 … 1.
        noise_rows: the noise scale B in rows.
        noise_rows_lower, noise_rows_upper: its 90% interval.
        noise_rows_of_data: the noise scale of the distance to the gradient of the training rows themselves.
    """

    signal_share: float = math.nan
    signal_share_lower: float = math.nan
    signal_share_upper: float = math.nan
    noise_rows: float = math.nan
    noise_rows_lower: float = math.nan
    noise_rows_upper: float = math.nan
    noise_rows_of_data: float = math.nan


class NoiseScaleEstimator:
    """A running estimate from the agreement and the power of measured updates, which may differ in their rows.

    It keeps weighted sums of P, of the noise of one row, N = (Q - P) · R, and of their products. Updates with more rows
    have more weight.
    """

    def __init__(self) -> None:
        self._n = 0
        self._weight = self._agreement = self._noise = 0.0  # Σw, ΣwP, ΣwN
        self._weight2 = self._agreement2 = self._both = self._noise2 = 0.0  # Σw², Σw²P², Σw²PN, Σw²N²

    def add(self, agreement: float, power: float, rows: int) -> None:
        """Add a measured update.

        Args:
            agreement: P, the mean product of the gradients of two halves.
            power: Q, the squared norm of the gradient.
            rows: R, the rows of the update.
        """
        noise, decay = (power - agreement) * rows, math.exp(-1 / _MEMORY)
        weight = float(rows) ** 2  # if most of a gradient is noise, the variance of P falls with the square of the rows
        self._n += 1
        self._weight = decay * self._weight + weight
        self._agreement = decay * self._agreement + weight * agreement
        self._noise = decay * self._noise + weight * noise
        self._weight2 = decay**2 * self._weight2 + weight**2
        self._agreement2 = decay**2 * self._agreement2 + (weight * agreement) ** 2
        self._both = decay**2 * self._both + weight**2 * agreement * noise
        self._noise2 = decay**2 * self._noise2 + (weight * noise) ** 2

    def estimate(self, rows: int, n_training_rows: int | None = None) -> NoiseEstimate:
        """Return the estimate for updates of this many rows.

        Args:
            n_training_rows: the rows that each epoch goes through, M; None for a stream. With them, the estimate has
                B_M, where 1 / B_M = 1 / B + 1 / M.
        """
        power = self._agreement + self._noise / rows
        if self._n < LEAST_MEASURED or not power > 0:
            return NoiseEstimate()
        share = self._agreement / power
        half = self._half_width(share, power, rows)
        lower, upper = (min(1.0, max(0.0, end)) for end in (share - half, share + half))
        if upper == 0 or (lower == 0 and upper == 1):
            return NoiseEstimate()
        shares = (min(1.0, share) if share > 0 else math.nan, lower, upper)
        least = _noise_rows(upper, rows)
        if lower == 0:
            return NoiseEstimate(*shares, math.nan, least, math.inf)
        scale = _noise_rows(shares[0], rows)
        return NoiseEstimate(*shares, scale, least, _noise_rows(lower, rows), _of_data(scale, n_training_rows))

    def _half_width(self, share: float, power: float, rows: int) -> float:
        """Return half the width of the interval, from the variance of a ratio and Student's t."""
        k = self._weight**2 / self._weight2  # the effective number of updates
        if k <= 1:
            return math.inf
        a, b = 1 - share, share / rows  # P - ρQ = aP - bN
        squares = max(0.0, a * a * self._agreement2 - 2 * a * b * self._both + b * b * self._noise2)
        return t_quantile(1 - (1 - _LEVEL) / 2, k - 1) * math.sqrt(squares * k / (k - 1)) / power

    def state_dict(self) -> dict[str, float]:
        return {name.removeprefix("_"): value for name, value in vars(self).items()}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        for name, value in state_dict.items():
            setattr(self, f"_{name}", value)


def summarize(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the last estimate, given the ledger's entries of measured updates; None if there are none.

    Besides the numbers of `NoiseEstimate`, it has the number of measured updates, the rows of an update, the number of
    training rows (0 for a stream), and the noise scale in tokens, which is NaN if the rows have no tokens.
    """
    if not entries:
        return None
    last = entries[-1]
    estimate = NoiseEstimate(**{name: last[name] for name in asdict(NoiseEstimate())})
    tokens, rows = sum(entry["tokens"] for entry in entries), sum(entry["rows"] for entry in entries)
    per_row = tokens / rows if tokens else math.nan
    in_rows = ("noise_rows", "noise_rows_lower", "noise_rows_upper")
    in_tokens = {name.replace("rows", "tokens"): per_row * getattr(estimate, name) for name in in_rows}
    counts = {"measured_updates": len(entries), "rows": last["update_rows"], "training_rows": last["training_rows"]}
    return counts | asdict(estimate) | in_tokens


def _noise_rows(share: float, rows: int) -> float:
    """Return the noise scale in rows for a positive share of the signal in updates of `rows` rows."""
    return rows * (1 / share - 1)


def _of_data(scale: float, n_training_rows: int | None) -> float:
    """Return B_M for a noise scale B and M training rows; NaN for a stream."""
    return math.nan if n_training_rows is None else scale / (1 + scale / n_training_rows)
