"""The time that an update spends in its phases."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Phase: TypeAlias = Literal["data", "passes", "optimizer"]


@dataclass
class UpdateSeconds:
    """The seconds of one update in each phase, as the host's clock measures them.

    They need no wait for the device besides the one for the gradient norm. So on a GPU, `passes` ends when the device
    has computed the norm, and `optimizer` is the time to start the kernels of the step. The device runs these kernels
    at the beginning of the next update, whose `passes` then includes them.

    Attributes:
        data: loading rows or waiting for them, in part those of the next window. On a GPU that is still busy when this
            ends, it counts as `passes`, because the GPU did not wait.
        passes: forward and backward passes and clipping, until the host knows the gradient norm.
        optimizer: the step of the optimizer and of the schedule.
    """

    data: float = 0.0
    passes: float = 0.0
    optimizer: float = 0.0


@dataclass
class PhaseTimer:
    """A timer for one update after another. Time outside of all phases is not counted."""

    _seconds: UpdateSeconds = field(default_factory=UpdateSeconds)
    _phases: list[Phase] = field(default_factory=list)
    _since: float = 0.0

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Count the time until exit as a phase. A phase inside another one interrupts it."""
        self._charge()
        self._phases.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._phases.pop()

    def count_as(self, phase: Phase) -> None:
        """Count the current phase, since its begin or its last interruption, as another one."""
        self._phases[-1] = phase

    def take(self) -> UpdateSeconds:
        """Return the seconds since they were last taken, and start again."""
        seconds, self._seconds = self._seconds, UpdateSeconds()
        return seconds

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._phases:
            phase = self._phases[-1]
            setattr(self._seconds, phase, getattr(self._seconds, phase) + now - self._since)
        self._since = now
