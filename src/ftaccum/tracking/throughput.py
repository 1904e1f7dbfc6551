"""What was worked through, and how long it took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Throughput:
    """What was worked through in how long: rows, and their token positions without and with padding, in how many
    forward passes."""

    rows: int = 0
    tokens: int = 0
    positions: int = 0
    passes: int = 0
    seconds: float = 0.0

    def merge(self, other: "Throughput") -> None:
        """Adds what was worked through; the time is taken apart from it."""
        self.rows += other.rows
        self.tokens += other.tokens
        self.positions += other.positions
        self.passes += other.passes

    @contextmanager
    def timed(self, sign: int = 1) -> Iterator[None]:
        """Adds the time inside; with -1 takes it off again, for what is done in the middle and is none of it."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += sign * (time.perf_counter() - started)
