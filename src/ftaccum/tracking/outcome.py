"""The results of a run as names and short texts, for a table of several runs."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..insight.format import format_bytes, format_duration, format_number, known
from ..insight.noise_words import describe_scale, is_known
from ..runtime.run_dir import RunDir
from .ledger import Ledger
from .update_times import seconds_by_use

if TYPE_CHECKING:
    from .result import Result


def describe_outcome(result: "Result", ledger: Ledger, run_dir: RunDir | None) -> dict[str, str]:
    """Return the results of a run by name, always in this order. Texts of results that are not known are empty.

    Args:
        result: its result.
        ledger: its ledger, which is empty if there is none.
        run_dir: its folder, if it has one.
    """
    return {
        "state": _state(result, run_dir),
        **_losses(result),
        **{
            f"final {name}": format_number(value)
            for name, value in (result.metrics[-1] if result.metrics else {}).items()
        },
        **_work(result, ledger),
        **_measured(result, ledger),
    }


def _state(result: "Result", run_dir: RunDir | None) -> str:
    if not result.interrupted:
        return "finished"
    n_updates = len(result.loss_history)
    is_running = run_dir is not None and run_dir.is_locked()
    return f"running, after update {n_updates:,}" if is_running else f"interrupted after update {n_updates:,}"


def _losses(result: "Result") -> dict[str, str]:
    final = "" if result.interrupted and math.isnan(result.final_loss) else format_number(known(result.final_loss))
    losses, is_validated = (final, format_number(result.initial_loss)), bool(result.val_loss_history)
    validation, training = (losses, ("", "")) if is_validated else (("", ""), losses)
    return {
        "final validation loss": validation[0],
        "first validation loss": validation[1],
        "best validation loss": "" if result.best_val_loss is None else format_number(result.best_val_loss),
        "best evaluation": "" if result.best_update is None else f"update {result.best_update:,}",
        "final training loss": training[0],
        "first training loss": training[1],
    }


def _work(result: "Result", ledger: Ledger) -> dict[str, str]:
    """Return what a run has done, and how fast."""
    rows, tokens = (sum(getattr(w, name) for w in ledger.windows) for name in ("rows", "tokens"))
    seconds = seconds_by_use(ledger)
    return {
        "updates": f"{result.optimizer_steps:,}",
        "skipped updates": f"{result.skipped_steps:,}" if result.skipped_steps else "",
        "rows trained on": f"{rows:,}" if rows else "",
        "tokens trained on": f"{tokens:,}" if tokens else "",
        "time with evaluations": "" if math.isnan(result.training_time) else format_duration(result.training_time),
        "time of updates": format_duration(sum(seconds.values())) if seconds else "",
        "rows per second": _rate(result.samples_per_second),
        "tokens per second": _rate(result.tokens_per_second),
        "padding": "" if result.padding_fraction is None else f"{result.padding_fraction:.1%}",
        "forward passes per update": f"{result.passes_per_update:.1f}",
        "out of memory": f"{result.out_of_memory} times" if result.out_of_memory else "",
    }


def _measured(result: "Result", ledger: Ledger) -> dict[str, str]:
    """Return the peak of memory, and what audits and the noise scale measured."""
    peak, noise = max((w.peak_memory for w in ledger.windows), default=0), result.noise_scale
    return {
        "peak memory": format_bytes(peak) if peak else "",
        "clipped updates": _clipped(ledger),
        "audits": _audits(result.audits),
        "noise scale": describe_scale(noise) if noise is not None and is_known(noise) else "",
    }


def _clipped(ledger: Ledger) -> str:
    known = [w.clip_coefficient for w in ledger.windows if not math.isnan(w.clip_coefficient)]
    return f"{sum(c < 1 for c in known) / len(known):.0%}" if known else ""


def _audits(audits: Sequence[dict[str, Any]]) -> str:
    if not audits:
        return ""
    n_exact = sum(audit["error"] <= audit["tolerance"] for audit in audits)
    return f"{n_exact} of {len(audits)} exact, largest error {max(audit['error'] for audit in audits):.0e}"


def _rate(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
