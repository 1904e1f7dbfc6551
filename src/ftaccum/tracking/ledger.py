"""The ledger of a run: one entry a window and one an epoch."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import OutputWarning, SettingsError, warn_user
from ..runtime.atomic_files import AppendOnlyFile


@dataclass(frozen=True)
class WindowEntry:
    """What one window came to.

    Attributes:
        window: index over the whole run, from 0.
        epoch: from 0; of the window's last row.
        rows: that it had, on all processes.
        loss: mean over the window's loss items, over all processes; NaN where it has none.
        terms: the same for each named mean of the loss, where it has several.
        grad_norm: total norm of the gradient before clipping.
        learning_rate: the rate of the first parameter group for this update.
        skipped: True where no optimizer step was taken (a loss or gradient that is not finite, or no loss items).
        passes: forward passes that it took, on each process.
    """

    window: int
    epoch: int
    rows: int
    loss: float
    terms: dict[str, float]
    grad_norm: float
    learning_rate: float
    skipped: bool
    passes: int


@dataclass(frozen=True)
class EpochEntry:
    """What one epoch came to: losses are means over its loss items, NaN where it had no update; `val_loss` is None
    without validation data."""

    epoch: int
    train_loss: float
    val_loss: float | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class AuditEntry:
    """What an audit found of one update, before it was taken.

    Attributes:
        audit: number of the update, from 1.
        epoch: from 0.
        rows: rows audited, on all processes.
        reference: what the accumulated gradient was compared with: "one batch" of these rows, or "another cut" of them.
        error: relative difference of the two gradients.
        loss_error: relative difference of the two losses.
        tolerance: the largest difference that counts as rounding.
        seconds: that the audit took.
    """

    audit: int
    epoch: int
    rows: int
    reference: str
    error: float
    loss_error: float
    tolerance: float
    seconds: float


Entry = WindowEntry | EpochEntry | AuditEntry


def read_entry(line: str) -> Entry:
    """Return the entry that a line of a ledger's file holds.

    Raises:
        ValueError, TypeError: where it holds none.
    """
    values = json.loads(line)
    kind = WindowEntry if "window" in values else AuditEntry if "audit" in values else EpochEntry
    return kind(**values)


def best_epoch(epochs: Iterable[EpochEntry]) -> int | None:
    """Return the epoch (from 1) of the lowest validation loss; None where no loss is finite."""
    losses = [(e.val_loss, e.epoch + 1) for e in epochs if e.val_loss is not None and e.val_loss < math.inf]
    return min(losses)[1] if losses else None


@dataclass
class Ledger:
    """Everything that a run records, in order. Given a path, every entry is also a JSON line in that file.

    A file that cannot be written, of a disk that is full, say, costs no entry and no update: lines that are missing are
    written, in order, as soon as that works again. Entries that it is made with are written with the first new one.

    Raises:
        SettingsError: where the file cannot be made to begin with.

    Warns:
        OutputWarning: the first time that the file cannot be written.
    """

    path: Path | None = None
    initial_val_loss: float | None = None
    windows: list[WindowEntry] = field(default_factory=list)
    epochs: list[EpochEntry] = field(default_factory=list)
    audits: list[AuditEntry] = field(default_factory=list)

    def __post_init__(self) -> None:
        # An epoch's entry comes after those of its windows.
        entries: list[Entry] = [*self.audits, *self.windows, *self.epochs]
        self._entries = sorted(entries, key=lambda e: (e.epoch, isinstance(e, EpochEntry)))
        self._has_warned = False
        self._file: AppendOnlyFile | None = None
        if self.path is not None:
            self.keep_in(self.path)

    def keep_in(self, path: Path) -> None:
        """Has the entries be lines of a file from now on, which is emptied. Those that are there are written with the
        next one, or by `write`.

        Raises:
            SettingsError: where the file cannot be made.
        """
        self.path = path
        try:
            self._file = AppendOnlyFile(path)
        except OSError as error:
            raise SettingsError(
                [f"The ledger cannot be written: {error}. Give an `output_dir` that can be written to."]
            ) from error

    def record(self, entry: Entry) -> None:
        self._add(entry)
        self.catch_up()

    def catch_up(self) -> None:
        """Writes the lines that are missing in the file, where that can be done."""
        try:
            self.write()
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                warn_user(
                    f"The ledger {str(self.path)!r} cannot be written: {error}. The run goes on; missing lines are "
                    "kept, and written as soon as that works again.",
                    OutputWarning,
                )

    def entries(self) -> list[Entry]:
        """All of them in order: an epoch's after those of its windows."""
        return list(self._entries)

    def resume_from(self, entries: Sequence[Entry]) -> None:
        """Begins with what an earlier part of the run has recorded."""
        for entry in entries:
            self._add(entry)

    def write(self) -> None:
        """Writes the lines that are missing in the file.

        Raises:
            OSError: where that cannot be done.
        """
        if self._file is not None:
            self._file.write(lambda n: map(_as_line, self._entries[n:]))

    def _add(self, entry: Entry) -> None:
        kinds: dict[type, list[Any]] = {WindowEntry: self.windows, EpochEntry: self.epochs, AuditEntry: self.audits}
        kinds[type(entry)].append(entry)
        self._entries.append(entry)

    @property
    def val_losses(self) -> list[float]:
        return [e.val_loss for e in self.epochs if e.val_loss is not None]


def _as_line(entry: Entry) -> str:
    return json.dumps(null_non_finite(vars(entry)), allow_nan=False)


def nan_null(value: float | None) -> float:
    return math.nan if value is None else value


def null_non_finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: null_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [null_non_finite(item) for item in value]
    return value
