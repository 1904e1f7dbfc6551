"""What ftaccum raises at its users: one sentence each, with the argument, what came and the remedy."""

import reprlib
import sys
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

LARGEST = 2**63 - 1  # of NumPy's and torch's integers


class _Shown(reprlib.Repr):
    """Shows values in messages: cuts long ones in the middle, and names those that cannot be shown."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200
        self.maxlist = self.maxtuple = 20

    def repr_int(self, x: int, level: int) -> str:  # noqa: ARG002
        return repr(x) if abs(x) <= LARGEST else "too large an integer"


shown = _Shown().repr


class SettingsError(ValueError):
    """One or more arguments cannot be used. `faults` holds a sentence for each."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))

    def __reduce__(self) -> tuple[type["SettingsError"], tuple[tuple[str, ...]]]:
        return type(self), (self.faults,)  # it may be sent to another process


def refuse(faults: Collection[str]) -> None:
    """Raise SettingsError with a sentence for each fault, if there are any."""
    if faults:
        raise SettingsError(list(faults))


class InexactLossError(SettingsError):
    """Accumulating this loss only approximates the large batch, and `on_inexact` is 'error'."""


class CheckpointError(SettingsError):
    """There is no checkpoint to go on from, or it is that of another run."""


class MetricsError(RuntimeError):
    """`compute_metrics` raised on the main of several processes: raised on all of them alike."""


class LostProcessError(RuntimeError):
    """Another process of the run has ended, or does not answer."""


class Preempted(SystemExit):
    """The run was asked to stop, and did after an update; `code`, the process's exit status, is 75 (`EX_TEMPFAIL` of
    sysexits.h: to be tried again)."""

    def __init__(self, sentence: str) -> None:
        super().__init__(75)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


class DataError(ValueError):
    """The data cannot be trained on; the message names the argument and, where there is one, the row."""


class DivergedError(RuntimeError):
    """Losses or gradients are not finite, and the run ends: on all processes alike, and with its ledger complete.

    Attributes:
        update: the number of the last one, from 1; None where it was not an update's.
        rows: the names of those whose own loss is not finite, as far as they were looked for.
    """

    def __init__(self, sentence: str, update: int | None = None, rows: Sequence[str] = ()) -> None:
        super().__init__(sentence)
        self.update, self.rows = update, tuple(rows)


class InexactLossWarning(UserWarning):
    """Accumulating this loss only approximates the large batch."""


class PaddingWarning(UserWarning):
    """Padding counts in a loss of the user's own."""


class TextWarning(UserWarning):
    """Rows of raw text are trained on in part, or have no text."""


class OutputWarning(UserWarning):
    """Something that a run was to leave behind is not there: a file could not be written, or a tracker failed."""


def warn_user(sentence: str, category: type[UserWarning]) -> None:
    """Warns at the line that called ftaccum, not at one of ftaccum's own, nor of what lies between those."""
    frame, depth, last = sys._getframe(), 1, 1
    while frame.f_back is not None:
        if Path(__file__).parent in Path(frame.f_code.co_filename).parents:
            last = depth
        frame, depth = frame.f_back, depth + 1
    warnings.warn(sentence, category, stacklevel=last + 1)
