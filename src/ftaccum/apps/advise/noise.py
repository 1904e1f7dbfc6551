"""What the noise scale that a run has measured says about its batch. This module does not load torch."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...insight.noise_words import describe_noise, describe_scale, is_bounded, is_known, rounded
from ...runtime.run_dir import RunDir
from ...tracking.result import Result
from ...tracking.run_record import RunRecord
from ..run_folder import check_run_folder

_LEVEL = "90% interval"
_CAVEATS = """Three caveats (docs/noise_scale.md):
- The noise scale is that of the plain gradient. Optimizers such as Adam rescale it.
- On one device, small batches reach the same loss if β₂ covers equally many tokens (arXiv:2507.07101).
- It assumes a well-chosen learning rate and the same curvature in all directions (arXiv:2505.23971).
`--check` compares batches directly."""
_CHECK = "`ftaccum advise {run} --check` compares half, the same and twice the batch instead."


def describe_run(folder: Path) -> str:
    """Return lines on the noise scale of the run in a folder, or why it is not known.

    Raises:
        SettingsError: if the folder has no run.
        DataError: if the run has not completed an update yet.
    """
    check_run_folder(folder)
    result = Result.load(folder)
    updates = result.optimizer_steps + result.skipped_steps
    head = f"Run: {folder}, {updates:,} updates, {result.effective_batch_size:,} rows an update"
    if result.noise_scale is None:
        return "\n".join([head, _unmeasured(result, RunRecord.read(RunDir(folder).record)), _CHECK.format(run=folder)])
    if not is_known(result.noise_scale):
        remedy = "Train longer, or measure more often: `noise_scale` is the number of updates between two measurements."
        known = describe_noise(result.noise_scale)
        return "\n".join([head, f"Noise scale: {known}.", remedy, _CHECK.format(run=folder)])
    return "\n".join([head, *describe_advice(result.noise_scale)])


def describe_advice(noise: Mapping[str, Any]) -> list[str]:
    """Return lines on an estimate whose interval is known.

    With the signal share ρ, the gradient of an update has the signal |μ|² and the power |μ|² / ρ. With twice the rows,
    the share is 2ρ / (1 + ρ), which is 2 / (1 + ρ) times as much.
    """
    rows, low, high = noise["rows"], noise["signal_share_lower"], noise["signal_share_upper"]
    in_tokens = "" if math.isnan(noise["noise_tokens_lower"]) else f"; {describe_scale(noise, 'tokens')}"
    if is_bounded(noise):
        share = noise["signal_share"]
        signal = (
            f"{share:.0%} of the squared gradient of an update of {rows:,} rows ({_LEVEL}: {low:.0%} to {high:.0%})"
        )
        worth = f"{2 / (1 + share):.2f} times as useful ({_LEVEL}: {2 / (1 + high):.2f} to {2 / (1 + low):.2f})"
    else:
        signal = f"at most {high:.0%} of the squared gradient of an update of {rows:,} rows"
        worth = f"{2 / (1 + high):.2f} times as useful or more"
    return [
        f"Noise scale: {describe_scale(noise)}{in_tokens}",
        *_of_data(noise),
        f"Signal: {signal}; the rest is noise",
        f"Doubling the batch makes an update {worth}",
        f"Useful range: {_useful(noise)}",
        _CAVEATS,
    ]


def _of_data(noise: Mapping[str, Any]) -> list[str]:
    """Return a line on the distance to the gradient of the run's own rows, if it is known."""
    scale, rows = noise["noise_rows_of_data"], noise["training_rows"]
    return [] if math.isnan(scale) else [f"Against the run's own {rows:,} training rows: {rounded(scale)} rows"]


def _useful(noise: Mapping[str, Any]) -> str:
    """Return a sentence on the batches up to the noise scale, whose signal share is a half or less: 2 / 1.5 = 1.33."""
    rows, bounded = noise["rows"], is_bounded(noise)
    upto = noise["noise_rows" if bounded else "noise_rows_lower"]
    if rows < noise["noise_rows_lower"]:
        where = f"This run's {rows:,} rows are below that"
    elif bounded and rows > noise["noise_rows_upper"]:
        where = f"This run's {rows:,} rows are above that"
    elif bounded:
        where = f"This run's {rows:,} rows are within the interval, so whether they are below that is not clear"
    else:
        where = f"It may reach past this run's {rows:,} rows, which is not known yet"
    end = f"about {rounded(upto)} rows" if bounded else f"{rounded(upto)} rows or more"
    use = "twice the rows make an update 1.33 times as useful or more"
    return f"up to {end}, {use}; from there on, less and less. {where}"


def _unmeasured(result: Result, record: RunRecord | None) -> str:
    """Return sentences on why a run has no noise scale, with a remedy if there is one."""
    if record is not None and record.noise_scale_reason:
        return f"Noise scale: not measured, because {record.noise_scale_reason}."
    if result.interrupted:
        return "Noise scale: not measured yet. Continue the run with `ftaccum train` and `--resume auto`."
    return "Noise scale: not measured. An older version trained the run, and did not record the reason."
