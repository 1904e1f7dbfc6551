"""Make ledger entries of the gradient noise scale from the measurements of updates."""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields

from ..insight.noise_scale import NoiseEstimate, NoiseScaleEstimator
from .ledger import NoiseScaleEntry, WindowEntry
from .step import NoiseMeasurement


class NoiseScaleRecorder:
    """The running estimate of the noise scale, over all parts of an interrupted run."""

    def __init__(self, n_training_rows: int | None) -> None:
        """Create a recorder without measurements.

        Args:
            n_training_rows: the rows that each epoch goes through; None for a stream.
        """
        self._n_training_rows, self._estimator = n_training_rows, NoiseScaleEstimator()

    def entry(self, window: WindowEntry, noise: NoiseMeasurement, rows: int) -> NoiseScaleEntry | None:
        """Add a measurement to the estimate, and return its entry; None if it is not usable.

        Args:
            window: the entry of the measured update.
            rows: the rows of a full update. The estimate is for these, or for all training rows if these are fewer.
        """
        if window.skipped or not (math.isfinite(noise.agreement) and math.isfinite(noise.power)):
            return None
        self._estimator.add(noise.agreement, noise.power, window.rows)
        rows = min(rows, self._n_training_rows or rows)
        estimate = self._estimator.estimate(rows, self._n_training_rows)
        return NoiseScaleEntry(
            noise_scale=window.window + 1,
            epoch=window.epoch,
            rows=window.rows,
            update_rows=rows,
            tokens=window.tokens,
            training_rows=self._n_training_rows or 0,
            agreement=noise.agreement,
            power=noise.power,
            **asdict(estimate),
            seconds=noise.seconds,
        )

    def state_dict(self) -> dict[str, float]:
        return self._estimator.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        self._estimator.load_state_dict(state_dict)


def tracked(entry: NoiseScaleEntry) -> dict[str, float]:
    """Return the numbers of an entry that trackers get: those that are known and finite."""
    names = ("agreement", "power", *(f.name for f in fields(NoiseEstimate)))
    values = {name: getattr(entry, name) for name in names}
    return {f"noise_scale/{name}": value for name, value in values.items() if math.isfinite(value)}
