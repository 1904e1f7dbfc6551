"""Exceptions and warnings of ftaccum. Each message names the argument, the value it got and the remedy."""

import reprlib
import sys
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

LARGEST = 2**63 - 1  # the largest integer of NumPy and torch


class _Shown(reprlib.Repr):
    """Formatter of values in messages. It shortens long values in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200
        self.maxlist = self.maxtuple = 20

    def repr_int(self, x: int, level: int) -> str:  # noqa: ARG002
        return repr(x) if abs(x) <= LARGEST else "too large an integer"


shown = _Shown().repr


def listed(names: Sequence[str], most: int) -> str:
    """Return names for a message: at most so many, and the number of the others."""
    others = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + others


class SettingsError(ValueError):
    """One or more arguments are invalid. `faults` has one sentence for each."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))

    def __reduce__(self) -> tuple[type["SettingsError"], tuple[tuple[str, ...]]]:
        return type(self), (self.faults,)  # so that it can be pickled and sent to another process


def fault_of_class(name: str, value: Any) -> str | None:
    """Return a message if an argument is a class where an object is wanted; None if it is not."""
    return (
        f"`{name}` is the class {value.__name__}. Give an object: `{value.__name__}()`."
        if isinstance(value, type)
        else None
    )


def refuse(faults: Collection[str]) -> None:
    """Raise SettingsError if there are any faults, with one sentence for each."""
    if faults:
        raise SettingsError(list(faults))


class InexactLossError(SettingsError):
    """Accumulating this loss only approximates one large batch, and `on_inexact` is 'error'."""


class CheckpointError(SettingsError):
    """There is no checkpoint to resume from, or it belongs to a different run."""


class CheckpointMismatchError(CheckpointError):
    """The run of the checkpoint had other settings. `differences` has a sentence for each.

    Args:
        problem: what was found, and the remedy.
        differences: a sentence for each setting that differs.
    """

    def __init__(self, problem: str, differences: Sequence[str]) -> None:
        self.problem, self.differences = problem, tuple(differences)
        super().__init__([problem, *differences])

    def __reduce__(self) -> tuple[type["CheckpointMismatchError"], tuple[str, tuple[str, ...]]]:  # type: ignore[override]
        return type(self), (self.problem, self.differences)


class MetricsError(RuntimeError):
    """`compute_metrics` or `preprocess_logits_for_metrics` failed. With several processes, all of them raise this."""


class CallbackError(RuntimeError):
    """A callback raised an error. All processes raise this one, once the current update is complete.

    On the process of the callback, `__cause__` is the original error.

    Attributes:
        result: the `Result`, if all updates were complete.
    """

    result: Any = None


class LostProcessError(RuntimeError):
    """Another process of the run has died or does not respond."""


class Preempted(SystemExit):
    """A signal asked the run to stop, and it stopped after an update. The exit status `code` is 75 (`EX_TEMPFAIL` in
    sysexits.h: try again later)."""

    def __init__(self, sentence: str) -> None:
        super().__init__(75)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


class DataError(ValueError):
    """The data cannot be used for training. The message names the argument and, if possible, the row."""


class DivergedError(RuntimeError):
    """Non-finite losses or gradients ended the run. All processes raise this error, and the ledger is complete.

    Attributes:
        update: the number of the last update, from 1; None if the error did not come from an update.
        rows: names of the rows found to have a non-finite loss of their own.
    """

    def __init__(self, sentence: str, update: int | None = None, rows: Sequence[str] = ()) -> None:
        super().__init__(sentence)
        self.update, self.rows = update, tuple(rows)


class InexactLossWarning(UserWarning):
    """Accumulating this loss only approximates one large batch."""


class PaddingWarning(UserWarning):
    """The user's loss depends on padding."""


class LossScaleWarning(UserWarning):
    """The user's loss is a whole fraction of the model's own, as if it were divided by the accumulation steps."""


class UntrainedLossWarning(UserWarning):
    """The user's loss has trainable parameters that no optimizer holds."""


class TextWarning(UserWarning):
    """Some rows of raw text are truncated or empty."""


class OutputWarning(UserWarning):
    """An output of the run is missing: a file could not be written, the model not be uploaded, or a tracker failed."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop; its type if the message is empty."""
    lines = (line.strip().rstrip(".") for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def warn_user(sentence: str, category: type[UserWarning]) -> None:
    """Issue a warning that points at the line where the user called ftaccum, or a Trainer made exact.

    It never points at a line inside ftaccum, its callbacks or that Trainer.
    """
    frame, depth, last = sys._getframe(), 1, 1
    while frame.f_back is not None:
        name = str(frame.f_globals.get("__name__", ""))
        is_ours = Path(__file__).parent in Path(frame.f_code.co_filename).parents
        # A Trainer that calls ftaccum was called by the user.
        if is_ours or (last == depth - 1 and name.split(".")[0] in ("transformers", "trl", "accelerate")):
            last = depth
        frame, depth = frame.f_back, depth + 1
    warnings.warn(sentence, category, stacklevel=last + 1)
