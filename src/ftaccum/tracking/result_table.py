"""The table that a run ends with, as text and as HTML."""

import html
import math
from typing import TYPE_CHECKING

from ..insight.format import format_duration, format_number
from ..insight.noise_words import describe_noise

if TYPE_CHECKING:
    from .result import Result


def as_text(result: "Result") -> str:
    """Return the table as plain text."""
    rows = _rows(result)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def as_html(result: "Result") -> str:
    """Return the table as HTML."""
    style = 'style="text-align:left"'
    rows = (
        f"<tr><th {style}>{html.escape(name)}</th><td {style}>{html.escape(value)}</td></tr>"
        for name, value in _rows(result)
    )
    return f"<table>{''.join(rows)}</table>"


def _rows(result: "Result") -> list[tuple[str, str]]:
    final = "none yet" if math.isnan(result.final_loss) and result.interrupted else format_number(result.final_loss)
    rows = [("final loss", f"{final} (before training {format_number(result.initial_loss)})")]
    if result.interrupted:
        rows.insert(0, ("interrupted", f"after update {len(result.loss_history)}"))
    if result.restored_update is not None:
        rows.append(("model", _describe_restored(result, result.restored_update)))
    if result.metrics and result.metrics[-1]:
        rows.append(("metrics", ", ".join(f"{k} {format_number(v)}" for k, v in result.metrics[-1].items())))
    if result.best_val_loss is not None:
        rows.append(("best validation loss", format_number(result.best_val_loss)))
    steps = f"{result.optimizer_steps} of {_describe_rows(result)} rows, {result.skipped_steps} skipped"
    rows.append(("updates", steps))
    if not math.isnan(result.training_time):
        speed = f"{result.samples_per_second:.1f} rows/s in training"
        rows.append(("time", f"{format_duration(result.training_time)}, {speed}"))
    elif not math.isnan(result.samples_per_second):
        rows.append(("speed", f"{result.samples_per_second:.1f} rows/s in training"))
    passes = f"{result.passes_per_update:.1f} forward passes per update on each process"
    if result.padding_fraction is not None:
        passes += f", {result.padding_fraction:.1%} of token positions were padding"
    if result.out_of_memory:
        passes += f"; out of memory and run again {result.out_of_memory} times"
    rows.append(("passes", passes))
    if result.audits:
        rows.append(("audits", _describe_audits(result)))
    if result.noise_scale is not None:
        rows.append(("noise scale", describe_noise(result.noise_scale)))
    if result.output_dir:
        missing = (
            f", except for {len(result.unwritten)} that could not be written or uploaded" if result.unwritten else ""
        )
        rows.append(("outputs", f"{result.output_dir}{missing}"))
    return rows


def _describe_restored(result: "Result", update: int) -> str:
    n = result.evaluation_updates.index(update)
    values = {"validation loss": result.val_loss_history[n], **result.metrics[n]}
    shown = ", ".join(f"{name} {format_number(value)}" for name, value in values.items())
    return f"weights of update {update} of {len(result.loss_history)}, the best evaluation: {shown}"


def _describe_rows(result: "Result") -> str:
    if not result.accumulation_schedule:
        return str(result.effective_batch_size)
    reached = [k for update, k in result.accumulation_schedule if update < len(result.loss_history)]
    least, most = (k * result.batch_size * result.num_processes for k in (min(reached), max(reached)))
    return str(least) if least == most else f"{least} to {most}"


def _describe_audits(result: "Result") -> str:
    worst = max(result.audits, key=lambda audit: audit["error"])
    n_off = sum(audit["error"] > audit["tolerance"] for audit in result.audits)
    verdict = f"{n_off} NOT exact, largest" if n_off else "all exact, largest"
    share = sum(audit["seconds"] for audit in result.audits) / result.training_time
    cost = "" if math.isnan(share) else f" ({share:.1%} of the time)"
    return (
        f"{len(result.audits)} of {len(result.loss_history):,} updates checked{cost}: {verdict} relative error "
        f"{worst['error']:.0e} (tolerance {worst['tolerance']:.0e})"
    )
