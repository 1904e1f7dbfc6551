"""What a pass costs on this machine, measured in the first updates."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from scipy.optimize import nnls

from ..planning.micro_batches import DEFAULT_COSTS, CostModel, MicroBatchRows

# Windows to time passes in, after the first, which warms up; and how unlike passes must be for a line through them.
MEASURED_WINDOWS, _PASSES, _SPREAD = 8, 12, 1.5
_GUESS_COUNTS = 1.0
_STALL = 2.0  # times what was to be expected: something else had the machine

Seconds = Callable[[], float]


class PassTimer(Protocol):
    """What the loop and the adaptation see of it.

    Attributes:
        windows: that have ended; None where nothing is measured.
    """

    windows: int | None

    def timing(self, piece: MicroBatchRows) -> AbstractContextManager[None]:
        """Around the passes of a micro-batch, but for the one in which processes wait for each other."""

    def window(self) -> CostModel | None:
        """Ends a window, whose update has waited for the device. Returns what passes cost, once it is known, on all
        processes alike; None before and after, and where the passes do not tell."""


class NoCalibration:
    """Stands where costs are given, or need not be known."""

    windows: int | None = None

    @contextmanager
    def timing(self, piece: MicroBatchRows) -> Iterator[None]:  # noqa: ARG002
        yield

    def window(self) -> CostModel | None:
        return None


class Calibration:
    """Times the passes of the first windows, without waiting for the device."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._timed: list[tuple[MicroBatchRows, Seconds]] = []
        self.windows: int | None = 0

    @contextmanager
    def timing(self, piece: MicroBatchRows) -> Iterator[None]:
        if not 0 < (self.windows or 0) <= MEASURED_WINDOWS or not piece.rows:
            yield
            return
        stop = _stopwatch(self._accelerator.device)
        yield
        self._timed.append((piece, stop()))

    def window(self) -> CostModel | None:
        self.windows = (self.windows or 0) + 1
        if self.windows != MEASURED_WINDOWS + 1:
            return None
        timed, self._timed = self._timed, []
        (costs,) = broadcast_object_list([fitted([(piece, seconds()) for piece, seconds in timed])])
        return costs


def fitted(timed: list[tuple[MicroBatchRows, float]]) -> CostModel | None:
    """Least squares through timed passes, no coefficient below 0; None where the passes are too few or too alike.

    In units of a token's time, and rounded to powers of two: the cheapest cut hardly changes within a factor of two,
    so that noise seldom changes it. (For runs that must repeat to the bit, costs are given.)
    """
    sizes = [piece.tokens for piece, _ in timed]
    if len(timed) < _PASSES or max(sizes) < _SPREAD * min(sizes):
        return None
    shapes_N3 = np.array([[1.0, piece.tokens, piece.tokens * piece.width] for piece, _ in timed])
    seconds_N = np.array([seconds for _, seconds in timed])
    found_3 = _line(shapes_N3, seconds_N)
    undisturbed = seconds_N <= _STALL * (shapes_N3 @ found_3)
    if undisturbed.sum() >= _PASSES:
        found_3 = _line(shapes_N3[undisturbed], seconds_N[undisturbed])
    costs = CostModel(*found_3.tolist())
    unit = costs.per_token or costs.per_square or costs.per_pass
    return CostModel(*(2.0 ** round(math.log2(cost / unit)) if cost else 0.0 for cost in astuple(costs)))


def _line(shapes_N3: np.ndarray, seconds_N: np.ndarray) -> np.ndarray:
    # Relative errors, so that a short pass tells as much as a long one. Where rows are of similar length, tokens and
    # squares grow alike, and noise would settle which of them is to cost: so the guess of their ratio counts as much as
    # a few passes.
    relative_N3 = shapes_N3 / seconds_N[:, None]
    ratio_3 = np.array([0.0, -DEFAULT_COSTS.per_square, DEFAULT_COSTS.per_token]) * np.median(relative_N3[:, 2])
    found_3, _ = nnls(np.vstack([relative_N3, _GUESS_COUNTS * ratio_3]), np.append(np.ones(len(seconds_N)), 0.0))
    return found_3


def _stopwatch(device: torch.device) -> Callable[[], Seconds]:
    """Starts; called, it stops, and returns what tells the seconds once the device has come so far."""
    if device.type == "cpu":
        started = time.perf_counter()

        def stop() -> Seconds:
            seconds = time.perf_counter() - started
            return lambda: seconds

        return stop
    events = torch.get_device_module(device).Event
    start, end = events(enable_timing=True), events(enable_timing=True)
    start.record()

    def stop_on_device() -> Seconds:
        end.record()
        return lambda: start.elapsed_time(end) / 1000

    return stop_on_device
