"""The curves of a run, from its output folder or from a result in memory."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..insight.curves import VALIDATION_LOSS, Measured, NoiseScaleCurve, RunCurves
from ..runtime.run_dir import RunDir
from .ledger import Ledger, WindowEntry
from .outcome import describe_outcome
from .run_record import RunRecord

if TYPE_CHECKING:
    from .result import Result

_NOT_SETTINGS = ("recipe", "sources", "environment", "started_at", "finished", "noise_scale_reason")


def curves_of(result: "Result", name: str = "", folder: Path | None = None) -> RunCurves:
    """Return the curves of a result: those of the ledger in its folder, if that is the ledger of this run.

    Args:
        result: the result.
        name: the name of the run on the page; empty for that of its folder.
        folder: the folder of the run, if it is not where the run wrote it.
    """
    folder = folder or (Path(result.output_dir) if result.output_dir is not None else None)
    run_dir = None if folder is None else RunDir(folder)
    ledger = Ledger() if run_dir is None else Ledger.read(run_dir.ledger)
    record = None if run_dir is None else RunRecord.read(run_dir.record)
    if not np.array_equal([w.loss for w in ledger.windows], result.loss_history, equal_nan=True):
        ledger, record = Ledger(), None  # the folder has another run by now
    windows = ledger.windows
    return RunCurves(
        name=name or ("run" if run_dir is None else run_dir.path.resolve().name),
        loss=result.loss_history,
        grad_norm=result.grad_norm_history,
        learning_rate=result.lr_history,
        rows=list(accumulate(w.rows for w in windows)),
        update_rows=[w.rows for w in windows],
        clip_norm=None if record is None else record.recipe.get("gradient_clip_norm"),
        evaluations=_evaluations(result, ledger),
        noise_scale=_noise_scale(ledger),
        padding=[1 - w.tokens / w.positions if w.positions else math.nan for w in windows],
        speed=_speeds(windows),
        speed_unit="tokens" if any(w.tokens for w in windows) else "rows",
        seconds=_seconds(ledger),
        outcome=describe_outcome(result, ledger, run_dir),
        settings=_settings(result, record),
        environment={} if record is None else dict(record.environment),
    )


def _evaluations(result: "Result", ledger: Ledger) -> dict[str, Measured]:
    """Return the validation losses and metrics, with those before training if the ledger has them."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    entries = [(e.evaluation, e.val_loss, e.metrics) for e in ledger.evaluations]
    entries = entries or list(zip(result.evaluation_updates, result.val_loss_history, result.metrics, strict=False))
    for update, loss, metrics in entries:
        for name, value in {VALIDATION_LOSS: loss, **metrics}.items():
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


def _speeds(windows: Sequence[WindowEntry]) -> list[float]:
    """Return tokens per second of each update, or rows if the tokens are not known. Audits take no part in it."""
    counts_tokens = any(w.tokens for w in windows)
    seconds = [w.data_seconds + w.pass_seconds + w.optimizer_seconds for w in windows]
    work = [w.tokens if counts_tokens else w.rows for w in windows]
    return [done / time if time > 0 else math.nan for done, time in zip(work, seconds, strict=True)]


def _seconds(ledger: Ledger) -> dict[str, float]:
    """Return the time of all updates by its use. It is empty if no update has times."""
    parts = {"data": "data_seconds", "forward and backward": "pass_seconds", "optimizer": "optimizer_seconds"}
    times = np.array([[getattr(w, name) for name in parts.values()] for w in ledger.windows]).reshape(-1, len(parts))
    if not np.isfinite(times).any():
        return {}
    seconds = dict(zip(parts, np.nansum(times, 0).tolist(), strict=True))
    return seconds | ({"audits": sum(a.seconds for a in ledger.audits)} if ledger.audits else {})


def _settings(result: "Result", record: RunRecord | None) -> dict[str, Any]:
    """Return the settings that the run recorded; without a record, the size of an update."""
    sizes = ("batch_size", "gradient_accumulation_steps", "effective_batch_size", "num_processes")
    if record is None:
        return {name: result[name] for name in (*sizes, "accumulation_schedule")}
    others = {name: value for name, value in asdict(record).items() if name not in _NOT_SETTINGS}
    return {**record.sources, **others, **record.recipe}
