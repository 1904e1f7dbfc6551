"""The file `run.json` in a run's folder: what the run is, and whether it has finished."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import OutputWarning, warn_user
from ..insight.run_metadata import public_name
from ..planning.batch_size import BatchSizes
from ..runtime.atomic_files import atomic_write
from .selection import Criterion

# Records of older versions lack them.
_ADDED = ("environment", "noise_scale_reason", "subject", "optimizer", "directory", "loaded_with", "text_columns")


@dataclass(frozen=True)
class Command:
    """The command line that started a run.

    Attributes:
        sources: the names of the model and the data, and how they are read, by option.
        resume: the command that resumes the run.
        note: a sentence on how the output folder was chosen; empty if the user gave it.
    """

    sources: dict[str, Any]
    resume: str
    note: str = ""


def size_entries(sizes: BatchSizes) -> dict[str, Any]:
    """Return the entries of a record that `RunRecord.batch_sizes` reads."""
    stages = [[update, each.gradient_accumulation_steps] for update, each in sizes.stages()]
    return {
        "batch_size": sizes.batch_size,
        "gradient_accumulation_steps": sizes.gradient_accumulation_steps,
        "effective_batch_size": sizes.effective_batch_size,
        "accumulation_schedule": stages if sizes.later else None,
        "num_processes": sizes.num_processes,
    }


@dataclass(frozen=True)
class RunRecord:
    """The record of a run, which is written when the run starts and again when it has finished.

    Attributes:
        recipe: the settings of the Recipe, without those that set the size of an update.
        tokens_per_update: the setting, which gave the size of an update if it is not None.
        batch_size: most rows of a micro-batch.
        gradient_accumulation_steps, effective_batch_size: k, and rows of a full update; of the first update if k
            changes.
        accumulation_schedule: pairs [from_update, k] if k changes; else None.
        num_processes: number of processes.
        amp_enabled: whether autocast is on.
        keep_checkpoints: the setting.
        sources: names of the model and the data; empty if a call from Python started the run.
        started_at: when this call started, in UTC; later if the run was resumed.
        finished: whether the run has reached its end and all outputs are written.
        environment: versions, system and device, by name; empty if an older version wrote the record.
        noise_scale_reason: why the run does not measure the gradient noise scale; empty if it does, or if an older
            version wrote the record.
        subject: the model, the data and the number of training rows; empty if an older version wrote the record.
        directory: the working folder of the command, from which relative paths in `sources` start; empty for a call
            from Python, or if an older version wrote the record.
        optimizer: the class of the optimizer and its betas; empty if an older version wrote the record.
        text_columns: the columns that the run reads texts from; None if the rows are no raw text, or if an older
            version wrote the record.
        loaded_with: the options with which `load_task` loaded the model; empty if it did not, or if an older version
            wrote the record.
    """

    recipe: dict[str, Any]
    tokens_per_update: int | None
    batch_size: int
    gradient_accumulation_steps: int
    effective_batch_size: int
    accumulation_schedule: list[list[int]] | None
    num_processes: int
    amp_enabled: bool
    keep_checkpoints: int
    sources: dict[str, Any]
    started_at: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat())
    finished: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    noise_scale_reason: str = ""
    subject: str = ""
    directory: str = ""
    optimizer: str = ""
    loaded_with: dict[str, Any] = field(default_factory=dict)
    text_columns: list[str] | None = None

    def batch_sizes(self) -> BatchSizes:
        """Return the sizes of updates."""
        later = tuple((update, k) for update, k in (self.accumulation_schedule or [])[1:])
        k = self.gradient_accumulation_steps
        return BatchSizes(self.batch_size, k, self.num_processes, self.effective_batch_size, later)

    def criterion(self) -> Criterion:
        """Return the criterion that decides which evaluation is the best."""
        return Criterion.of_settings(self.recipe.get("metric_for_best"), self.recipe.get("greater_is_better"))

    def describe_subject(self) -> str:
        """Return the model, the data and the date of the run as one line."""
        names = [public_name(str(self.sources[name])) for name in ("model", "train_data") if self.sources.get(name)]
        return ", ".join(part for part in (self.subject or " on ".join(names), self.started_at[:10]) if part)

    def write(self, path: Path) -> bool:
        """Write the record, and return whether that worked. If not, remove an older record, which is of another run.

        Warns:
            OutputWarning: if the file cannot be written.
        """
        try:
            with atomic_write(path) as partial:
                partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        except OSError as error:
            warn_user(
                f"{str(path)!r} cannot be written: {error}. The run continues. `--resume auto` without `--output_dir` "
                "will not find it.",
                OutputWarning,
            )
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return False
        return True

    @classmethod
    def read(cls, path: Path) -> "RunRecord | None":
        """Return the record in a file; None if there is no such file, or if it is not a record."""
        try:
            read = json.loads(path.read_text())
            return cls(**{f.name: read[f.name] for f in fields(cls) if f.name not in _ADDED or f.name in read})
        except (OSError, ValueError, TypeError, KeyError):
            return None
