"""The amount of work done, and the time it took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass
class Throughput:
    """The work done in some time: rows, tokens, token positions with padding (`positions`), and forward passes."""

    rows: int = 0
    tokens: int = 0
    positions: int = 0
    passes: int = 0
    seconds: float = 0.0

    def merge(self, other: "Throughput") -> None:
        """Add the work of another, but not its time, which is measured separately."""
        self.rows += other.rows
        self.tokens += other.tokens
        self.positions += other.positions
        self.passes += other.passes

    def with_passes(self, times: int) -> "Throughput":
        """Return the same work with each pass counted several times."""
        return replace(self, passes=times * self.passes)

    @contextmanager
    def timed(self, sign: int = 1) -> Iterator[None]:
        """Add the time until exit. With `sign=-1`, subtract it, for work inside a timed block that must not count."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += sign * (time.perf_counter() - started)
