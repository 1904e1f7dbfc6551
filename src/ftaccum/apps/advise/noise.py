"""What the noise scale that a run has measured says about its batch. This module does not load torch."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import SettingsError
from ...insight.noise_scale import describe
from ...runtime.run_dir import RunDir
from ...tracking.result import Result
from ...tracking.run_record import RunRecord

_FEWEST_ROWS = 16  # of an update that can be measured
_CHECK = "`ftaccum advise {run} --check` compares half, the same and twice the batch instead."


def describe_run(folder: Path) -> str:
    """Return lines on the noise scale of the run in a folder, or why it is not known.

    Raises:
        SettingsError: if the folder has no run.
        DataError: if the run has not completed an update yet.
    """
    run_dir = RunDir(folder)
    if not folder.is_dir():
        raise SettingsError([f"There is no folder {str(folder)!r}. Give the output folder of a run."])
    if not (run_dir.result.is_file() or run_dir.record.is_file()):
        raise SettingsError(
            [f"{str(folder)!r} has no result.json and no run.json, so it is not the output folder of a run."]
        )
    result = Result.load(folder)
    updates = result.optimizer_steps + result.skipped_steps
    head = f"Run: {folder}, {updates:,} updates, {result.effective_batch_size:,} rows an update"
    if result.noise_scale is None:
        return "\n".join([head, *_unmeasured(result, RunRecord.read(run_dir.record)), _CHECK.format(run=folder)])
    if math.isnan(result.noise_scale["lower"]):
        remedy = "Train longer. " if result.interrupted else ""
        return "\n".join(
            [head, f"Noise scale: {describe(result.noise_scale)}.", f"{remedy}{_CHECK.format(run=folder)}"]
        )
    return "\n".join([head, *describe_scale(result.noise_scale)])


def describe_scale(noise: Mapping[str, Any]) -> list[str]:
    """Return lines on an estimate whose interval is known.

    With the signal share ρ, the gradient of one update has the mean |μ|² and the power |μ|² / ρ. An update of twice the
    rows has the share 2ρ / (1 + ρ), which is 2 / (1 + ρ) times as much.
    """
    share, low, high = noise["signal_share"], max(0.0, noise["lower"]), min(1.0, noise["upper"])
    rows, interval = noise["rows"], "90% interval"
    signal, worth = min(1.0, max(0.0, share)), [2 / (1 + each) for each in (high, low)]
    return [
        f"Noise scale: {_scale(noise, 'rows', interval)}"
        + ("" if math.isnan(noise["noise_tokens_lower"]) else f"; {_scale(noise, 'tokens', interval)}"),
        f"Signal: {signal:.0%} of the squared gradient of an update of {rows:,} rows ({interval} {low:.0%} to "
        f"{high:.0%}); the rest is noise",
        f"Doubling the batch makes an update {2 / (1 + signal):.2f} times as useful ({interval} {worth[0]:.2f} to "
        f"{worth[1]:.2f})",
        f"Useful range: {_useful(noise)}",
        "This is the plain gradient's geometry, not the optimizer's, and it counts updates, not time: "
        "docs/noise_scale.md says what it leaves out. `--check` compares batches directly.",
    ]


def _scale(noise: Mapping[str, Any], unit: str, interval: str) -> str:
    found, low, high = (noise[f"noise_{unit}{end}"] for end in ("", "_lower", "_upper"))
    if noise["lower"] <= 0 or not math.isfinite(high):
        return f"at least {_rounded(low)} {unit}"
    return f"{_rounded(found)} {unit} ({interval} {_rounded(low)} to {_rounded(high)})"


def _useful(noise: Mapping[str, Any]) -> str:
    least, rows = noise["noise_rows_lower"], noise["rows"]
    unbounded = noise["lower"] <= 0 or not math.isfinite(noise["noise_rows_upper"])
    upto = least if unbounded else noise["noise_rows"]
    known = f"at least {_rounded(least)} rows" if unbounded else f"about {_rounded(upto)} rows"
    where = "below" if rows < upto else "above"
    return (
        f"up to {known}, each doubling makes an update 1.33 times as useful or more; from there on, less and less. "
        f"This run's {rows:,} rows are {where} that"
    )


def _unmeasured(result: Result, record: RunRecord | None) -> list[str]:
    """Return lines on why a run has no noise scale, as far as its folder tells."""
    if result.effective_batch_size < _FEWEST_ROWS:
        return [
            f"Noise scale: not measured, because an update has {result.effective_batch_size} rows. It needs at least "
            f"{_FEWEST_ROWS}: give a larger `effective_batch_size`."
        ]
    if record is not None and record.recipe.get("loss_over") == "window":
        return [
            "Noise scale: not measured, because the loss compares all rows of an update, so the gradients of two "
            "halves do not add up to it."
        ]
    return [
        "Noise scale: not measured. The run is too short, its loss is not a sum over rows, it is deterministic, or "
        "`noise_scale` is False. If none of these holds, an older version trained it: train with this one."
    ]


def _rounded(number: float) -> str:
    """Return a number with two digits, and zeros after them."""
    if not 10 <= number < math.inf:
        return f"{number:.2g}"
    return f"{round(number, 1 - math.floor(math.log10(number))):,.0f}"
