"""What ftaccum raises at its users: one sentence each, with the argument, what came and the remedy."""

from collections.abc import Sequence


class SettingsError(ValueError):
    """One or more arguments cannot be used. `faults` holds a sentence for each."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))

    def __reduce__(self) -> tuple[type["SettingsError"], tuple[tuple[str, ...]]]:
        return type(self), (self.faults,)  # it may be sent to another process


class InexactLossError(SettingsError):
    """Accumulating this loss only approximates the large batch, and `on_inexact` is 'error'."""


class DataError(ValueError):
    """The data cannot be trained on; the message names the argument and, where there is one, the row."""


class StreamError(DataError):
    """A stream cannot be read on; raised on all processes alike, after the last update that its rows were there for."""


class InexactLossWarning(UserWarning):
    """Accumulating this loss only approximates the large batch."""


class PaddingWarning(UserWarning):
    """Padding counts in a loss of the user's own."""
