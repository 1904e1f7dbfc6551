"""The ledger of a run: one entry per window, epoch, evaluation, audit and measurement of the noise scale."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import OutputWarning, SettingsError, warn_user
from ..runtime.atomic_files import AppendOnlyFile


@dataclass(frozen=True)
class WindowEntry:
    """The record of one window.

    Attributes:
        window: index over the whole run, from 0.
        epoch: the epoch of the window's last row, from 0.
        rows: number of rows, over all processes.
        loss: mean over the window's loss items, over all processes; NaN if it has none.
        terms: the same for each named mean of the loss, if it has several; empty otherwise.
        grad_norm: total norm of the gradient before clipping.
        learning_rate: the rate of the first parameter group for this update.
        skipped: True if no optimizer step was taken (the loss or gradient was not finite, or there were no loss items).
        passes: number of forward passes on each process.
        tokens: number of token positions that are not padding, over all processes; 0 if not known.
        positions: number of token positions, padding included, over all processes; 0 if not known.
        clip_coefficient: factor by which clipping multiplied the gradient, at most 1; NaN if not known.
        data_seconds: time that the main process waited for the window's rows; NaN if not known, as the other times.
        pass_seconds: time of its forward and backward passes, until it knows the gradient norm.
        optimizer_seconds: time of its optimizer step and schedule, without clipping.
        peak_memory: most bytes allocated so far: on a GPU by its tensors, on a CPU by the process; of all processes
            the largest; 0 if not known.
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
    tokens: int = 0
    positions: int = 0
    clip_coefficient: float = math.nan
    data_seconds: float = math.nan
    pass_seconds: float = math.nan
    optimizer_seconds: float = math.nan
    peak_memory: int = 0

    @property
    def seconds(self) -> float:
        """Time of the update, without audits; NaN if not known."""
        return self.data_seconds + self.pass_seconds + self.optimizer_seconds


@dataclass(frozen=True)
class EpochEntry:
    """The record of one epoch. `train_loss` is the mean over the loss items of its updates; NaN if it had none."""

    epoch: int
    train_loss: float


@dataclass(frozen=True)
class EvaluationEntry:
    """The record of an evaluation on the validation rows.

    Attributes:
        evaluation: number of updates before it; 0 for the evaluation before training.
        epoch: the epoch of the last of these updates, from 0.
        rows: number of rows trained on by then. Each epoch counts its rows again.
        train_loss: mean over the loss items of the updates since the previous evaluation; NaN if there were none.
        val_loss: mean over all loss items of the validation rows.
        metrics: metrics by name.
    """

    evaluation: int
    epoch: int
    rows: int
    train_loss: float
    val_loss: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class AuditEntry:
    """The record of an audit of one update, made before its optimizer step.

    Attributes:
        audit: number of the update, from 1.
        epoch: the epoch of the update, from 0.
        rows: number of rows audited, over all processes.
        reference: the reference for the accumulated gradient: "one batch" of these rows, or "another cut" of them into
            micro-batches.
        error: relative difference of the two gradients.
        loss_error: relative difference of the two losses.
        tolerance: the largest difference that counts as rounding.
        seconds: time that the audit took.
    """

    audit: int
    epoch: int
    rows: int
    reference: str
    error: float
    loss_error: float
    tolerance: float
    seconds: float


@dataclass(frozen=True)
class NoiseScaleEntry:
    """The record of an update at which the gradient noise scale was measured, with the estimate so far.

    Attributes:
        noise_scale: number of the update, from 1.
        epoch: the epoch of the update, from 0.
        rows: number of rows of the update, over all processes.
        update_rows: number of rows of a full update, which the estimate is for.
        tokens: number of tokens of these rows, without padding; 0 if they have none.
        training_rows: number of rows that each epoch goes through; 0 for a stream.
        agreement: product of the gradients of two random halves of the rows.
        power: squared norm of the gradient before clipping.
        signal_share: estimated share of the signal in a gradient so far; NaN while it is not known, as the next ones.
        signal_share_lower, signal_share_upper: its 90% interval.
        noise_rows: estimated noise scale in rows so far; NaN also if `signal_share_lower` is 0.
        noise_rows_lower, noise_rows_upper: its 90% interval; the upper end is infinite if `signal_share_lower` is 0.
        noise_rows_of_data: the noise scale for the distance to the gradient of the training rows; NaN for a stream, and
            where `noise_rows` is.
        seconds: time that measuring took on the main process, without the time of more passes. On a device, the time
            to start its work, which runs later.
    """

    noise_scale: int
    epoch: int
    rows: int
    update_rows: int
    tokens: int
    training_rows: int
    agreement: float
    power: float
    signal_share: float
    signal_share_lower: float
    signal_share_upper: float
    noise_rows: float
    noise_rows_lower: float
    noise_rows_upper: float
    noise_rows_of_data: float
    seconds: float


Entry = WindowEntry | EpochEntry | EvaluationEntry | AuditEntry | NoiseScaleEntry


@dataclass
class Ledger:
    """Everything that a run records, in order. Given a path, every entry is also a JSON line in that file.

    If the file cannot be written, for example because the disk is full, the run loses no entry and no update. The
    missing lines are written, in order, as soon as writing works again.

    Raises:
        SettingsError: if the file cannot be created.

    Warns:
        OutputWarning: the first time that the file cannot be written.
    """

    path: Path | None = None
    windows: list[WindowEntry] = field(init=False, default_factory=list)
    epochs: list[EpochEntry] = field(init=False, default_factory=list)
    evaluations: list[EvaluationEntry] = field(init=False, default_factory=list)
    audits: list[AuditEntry] = field(init=False, default_factory=list)
    noise_scales: list[NoiseScaleEntry] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._entries: list[Entry] = []
        self._has_warned = False
        self._file: AppendOnlyFile | None = None
        if self.path is not None:
            self.keep_in(self.path)

    def keep_in(self, path: Path) -> None:
        """Write entries to a file from now on, and empty it. Existing entries are written with the next, or by `write`.

        Raises:
            SettingsError: if the file cannot be created.
        """
        self.path = path
        try:
            self._file = AppendOnlyFile(path)
        except OSError as error:
            raise SettingsError(
                [f"The ledger cannot be written: {error}. Give an `output_dir` that you can write to."]
            ) from error

    def record(self, entry: Entry) -> None:
        self._add(entry)
        self.catch_up()

    def catch_up(self) -> None:
        """Write the lines that are missing in the file, or warn the first time that this fails."""
        try:
            self.write()
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                warn_user(
                    f"The ledger {str(self.path)!r} cannot be written: {error}. The run continues. It keeps the "
                    "missing lines and writes them as soon as the file can be written again.",
                    OutputWarning,
                )

    def entries(self) -> list[Entry]:
        """Return all entries, in the order in which they were recorded."""
        return list(self._entries)

    def resume_from(self, entries: Sequence[Entry]) -> None:
        """Add the entries that an earlier part of the run has recorded."""
        for entry in entries:
            self._add(entry)

    def write(self) -> None:
        """Write the lines that are missing in the file.

        Raises:
            OSError: if that fails.
        """
        if self._file is not None:
            self._file.write(lambda n: map(_as_line, self._entries[n:]))

    def _add(self, entry: Entry) -> None:
        kinds: dict[type, list[Any]] = {
            WindowEntry: self.windows,
            EpochEntry: self.epochs,
            EvaluationEntry: self.evaluations,
            AuditEntry: self.audits,
            NoiseScaleEntry: self.noise_scales,
        }
        kinds[type(entry)].append(entry)
        self._entries.append(entry)


def _as_line(entry: Entry) -> str:
    return json.dumps(null_non_finite(vars(entry)), allow_nan=False)


def nan_null(value: Any) -> Any:
    """Return NaN for None, and any other value unchanged."""
    return math.nan if value is None else value


def null_non_finite(value: Any) -> Any:
    """Return a value with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: null_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [null_non_finite(item) for item in value]
    return value
