"""What ftaccum raises at its users: one sentence each, with the argument, what came and the remedy."""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path


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


class InexactLossWarning(UserWarning):
    """Accumulating this loss only approximates the large batch."""


class PaddingWarning(UserWarning):
    """Padding counts in a loss of the user's own."""


def warn_user(sentence: str, category: type[UserWarning]) -> None:
    """Warns at the line that called ftaccum, not at one of ftaccum's own."""
    frame, depth = sys._getframe(), 1
    while frame.f_back is not None and Path(__file__).parent in Path(frame.f_code.co_filename).parents:
        frame, depth = frame.f_back, depth + 1
    warnings.warn(sentence, category, stacklevel=depth)
