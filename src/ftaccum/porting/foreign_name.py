"""A name that users bring from another library, and what to write here instead."""

import re
from dataclasses import dataclass

# An argument in backticks, alone or with a value: `batch_size`, `batch_size="auto"`.
ARGUMENT = re.compile(r"`(\w+)(?:=([^`]+))?`")


@dataclass(frozen=True)
class ForeignName:
    """One or more names of another library that have the same answer.

    Attributes:
        names: the names, separated by spaces.
        here: the arguments that take their place, each in backticks, as in Python. Empty if there are none.
        note: full sentences on how a value converts, or why there is no such argument.
    """

    names: str
    here: str = ""
    note: str = ""

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the arguments that take the place of these names."""
        return tuple(name for name, _ in ARGUMENT.findall(self.here))
