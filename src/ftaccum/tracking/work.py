"""The amount of work in a window."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Work:
    """Tokens, token positions with padding (`positions`), and forward passes, on one process."""

    tokens: int
    positions: int
    passes: int

    def with_passes(self, times: int) -> "Work":
        """Return the same work with each pass counted several times."""
        return replace(self, passes=times * self.passes)
