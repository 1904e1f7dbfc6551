"""The amount of work in a window or in several."""

from dataclasses import dataclass, replace


@dataclass
class Work:
    """Rows, tokens, token positions with padding (`positions`), and forward passes, on one process."""

    rows: int = 0
    tokens: int = 0
    positions: int = 0
    passes: int = 0

    def merge(self, other: "Work") -> None:
        """Add the work of another."""
        self.rows += other.rows
        self.tokens += other.tokens
        self.positions += other.positions
        self.passes += other.passes

    def with_passes(self, times: int) -> "Work":
        """Return the same work with each pass counted several times."""
        return replace(self, passes=times * self.passes)
