"""The curves of a run, from its output folder or from a result in memory."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from ..insight.curves import VALIDATION_LOSS, Measured, NoiseScaleCurve, RunCurves, with_loss
from ..runtime.run_dir import RunDir
from ..settings.recipe import Recipe
from ..settings.runtime import Runtime
from .ledger import Ledger
from .ledger_file import LedgerFile
from .outcome import describe_outcome
from .recorded import Recorded
from .run_record import RunRecord
from .update_times import seconds_by_use, speeds

if TYPE_CHECKING:
    from .result import Result

_SIZES = ("batch_size", "gradient_accumulation_steps", "effective_batch_size", "num_processes")
_NOT_SETTINGS = (
    "recipe",
    "sources",
    "environment",
    "subject",
    "optimizer",
    "started_at",
    "finished",
    "noise_scale_reason",
)
SOURCE_DEFAULTS = {"mlm_probability": 0.15, "dtype": "auto"}  # of `ftaccum train`; the others are empty
_DEFAULTS = {f.name: f.default for kind in (Runtime, Recipe) for f in fields(kind)}
_COPIED = "the run had no `output_dir`, and a result that is copied or loaded from a file has no ledger"
_OLD = "an older version wrote the ledger and did not record it"


def curves_of(
    result: "Result", name: str = "", folder: Path | None = None, recorded: Recorded | None = None
) -> RunCurves:
    """Return the curves of a result: those of the ledger in its folder, if that is the ledger of this run.

    Args:
        result: the result.
        name: the name of the run on the page; empty for that of its folder.
        folder: the folder of the run, if it is not where the run wrote it.
        recorded: the ledger and the record in memory of a run without a folder.
    """
    folder = folder or (Path(result.output_dir) if result.output_dir is not None else None)
    run_dir = None if folder is None else RunDir(folder)
    found, reason = _read(result, run_dir, recorded)
    ledger, record, windows = found.ledger, found.record, found.ledger.windows
    unit = "tokens" if any(w.tokens for w in windows) else "rows"
    settings = _settings(result, record)
    return RunCurves(
        name=name or ("" if run_dir is None else run_dir.path.resolve().name),
        subject="" if record is None else record.describe_subject(),
        loss=result.loss_history,
        grad_norm=result.grad_norm_history,
        learning_rate=result.lr_history,
        rows=list(accumulate(w.rows for w in windows)),
        update_rows=[w.rows for w in windows],
        clip_norm=None if record is None else record.recipe.get("gradient_clip_norm"),
        evaluations=_evaluations(result, ledger),
        noise_scale=_noise_scale(ledger),
        padding=[1 - w.tokens / w.positions if w.positions else math.nan for w in windows],
        speed=speeds(windows, unit),
        speed_unit=unit,
        seconds=seconds_by_use(ledger),
        gaps=_gaps(ledger, record, reason),
        outcome={**describe_outcome(result, ledger, run_dir), "note": reason if windows else ""},
        settings=settings,
        changed=_changed(settings, record),
        environment={} if record is None else dict(record.environment),
    )


def _read(result: "Result", run_dir: RunDir | None, recorded: Recorded | None) -> tuple[Recorded, str]:
    """Return the ledger and the record of a result, and why there is no ledger, or where it is damaged."""
    if run_dir is None:
        return recorded or Recorded(), _COPIED
    found = LedgerFile.read(run_dir.ledger)
    ledger, record, losses = found.ledger, RunRecord.read(run_dir.record), [w.loss for w in found.ledger.windows]
    if losses and _are_equal(losses, result.loss_history):
        return Recorded(ledger, record), "" if found.ends_there else found.damage
    if not run_dir.ledger.is_file():
        reason = "the folder of the run has no `ledger.jsonl`"
    elif _are_equal(losses, result.loss_history[: len(losses)]):
        reason = found.damage or f"`ledger.jsonl` ends after update {len(losses):,}"
    else:
        return Recorded(), "the folder of the run has the ledger of another run by now"
    return Recorded(record=record if _has_result(run_dir, record, result) else None), reason


def _has_result(run_dir: RunDir, record: RunRecord | None, result: "Result") -> bool:
    """Return whether the folder has the record and the file of a result, and not those of another run by now."""
    if record is None or not record.finished:
        return False
    try:
        return _are_equal(type(result).load(run_dir.result).loss_history, result.loss_history)
    except (OSError, DataError):
        return False


def _are_equal(some: Sequence[float], others: Sequence[float]) -> bool:
    """Return whether losses are equal, where NaN equals NaN and an infinity, which files do not have."""
    one, two = (np.where(np.isfinite(values := np.asarray(each, float)), values, np.nan) for each in (some, others))
    return np.array_equal(one, two, equal_nan=True)


def _gaps(ledger: Ledger, record: RunRecord | None, reason: str) -> dict[str, str]:
    """Return why quantities are missing that only a ledger has.

    Args:
        ledger: the ledger; empty if there is none.
        record: the record, if there is one.
        reason: why there is no ledger.
    """
    if not ledger.windows:
        return dict.fromkeys(("padding", "speed", "seconds", "noise_scale"), reason)
    is_old = not any(math.isfinite(w.pass_seconds) for w in ledger.windows)
    padding = _OLD if is_old else "the rows have no tokens"
    noise = record.noise_scale_reason.rstrip(".") if record is not None else ""
    return {"padding": padding, "speed": _OLD, "seconds": _OLD} | ({"noise_scale": noise} if noise else {})


def _evaluations(result: "Result", ledger: Ledger) -> dict[str, Measured]:
    """Return the validation losses and metrics, with those before training as far as they are known."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    entries = [(e.evaluation, e.val_loss, e.metrics) for e in ledger.evaluations]
    if not entries and result.val_loss_history:
        later = zip(result.evaluation_updates, result.val_loss_history, result.metrics, strict=False)
        entries = [(0, result.initial_loss, result.initial_metrics), *later]
    for update, loss, metrics in entries:
        for name, value in with_loss(loss, metrics, VALIDATION_LOSS).items():
            updates, values = found.setdefault(name, ([], []))
            updates.append(update)
            values.append(value)
    return {name: Measured(*both) for name, both in found.items()}


def _noise_scale(ledger: Ledger) -> NoiseScaleCurve | None:
    entries = ledger.noise_scales
    if not entries:
        return None
    return NoiseScaleCurve(
        updates=[e.noise_scale for e in entries],
        values=[e.noise_rows for e in entries],
        lower=[e.noise_rows_lower for e in entries],
        upper=[e.noise_rows_upper for e in entries],
    )


def _settings(result: "Result", record: RunRecord | None) -> dict[str, Any]:
    """Return the settings that the run recorded; without a record, the size of an update."""
    if record is None:
        return {name: result[name] for name in (*_SIZES, "accumulation_schedule")}
    others = {name: value for name, value in asdict(record).items() if name not in _NOT_SETTINGS}
    used = {"optimizer": record.optimizer} if record.optimizer else {}
    return {**record.sources, **others, **record.recipe, **used}


def _changed(settings: Mapping[str, Any], record: RunRecord | None) -> list[str]:
    """Return the settings that say most about a run: the model and the data, sizes, and what is not at its default."""
    names = [
        name
        for name in (() if record is None else record.sources)
        if settings[name] and settings[name] != SOURCE_DEFAULTS.get(name)
    ]
    return names + [
        name
        for name, value in settings.items()
        if name not in names and (name in _SIZES or (name in _DEFAULTS and value != _DEFAULTS[name]))
    ]
