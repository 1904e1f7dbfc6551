"""The Result of a run, derived from its ledger."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..insight.noise_scale import summarize
from ..planning.batch_size import BatchSizes
from ..runtime.run_dir import RunDir
from .ledger import Ledger
from .recorded import Recorded
from .recorded_result import read_without_result
from .result_file import read_result, write_values
from .result_frames import as_frame
from .result_table import as_html, as_text
from .run_reports import plot_result, report_result
from .save_trained import save_trained
from .selection import Criterion
from .trained_model import TrainedModel
from .update_times import mean_speed, padding_share

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Result(Mapping[str, Any]):
    """The result of `test_fine_tuning`, whose attributes can also be read as a mapping: `result["final_loss"]`.

    Losses are means over loss items (tokens, rows, …), however the batch is accumulated.

    Attributes:
        final_loss: validation loss after the last update; without validation data, training loss of the last epoch.
        initial_loss: validation loss before the first update; without validation data, loss of the first window.
        best_val_loss: the lowest finite validation loss of any evaluation after the first update, or None.
        best_update: number of updates at the best evaluation, by `metric_for_best`, or None.
        loss_history, grad_norm_history, lr_history: one entry per window, including skipped ones. Norms are before
            clipping, and the rate is the one used.
        train_loss_history: one entry per epoch.
        val_loss_history, metrics, evaluation_updates: one entry per evaluation: its validation loss, its metrics by
            name, and the number of updates before it. The evaluation before training is not included: it is
            `initial_loss` and `initial_metrics`.
        optimizer_steps, skipped_steps: windows with and without an optimizer step; together, all windows.
        short_updates: numbers of the updates with fewer rows than a full window, such as the last one of an epoch. A
            loss over the window depends on the number of rows, so it cannot be compared with that of a full one.
        effective_batch_size, gradient_accumulation_steps: rows of a full window, over all processes, and k. If k
            changed, these are the values of the last update.
        batch_size, num_processes: most rows of a micro-batch, and the number of processes.
        accumulation_schedule: pairs [from_update, k] if k was to change; else None.
        training_time: seconds of training and evaluation, without loading.
        samples_per_second, tokens_per_second: training rows and tokens without padding, per second of training only.
        padding_fraction: share of the token positions in training batches that were padding.
        passes_per_update: mean number of forward passes on each process. It may be less or more than k, depending on
            how the planner cut the windows.
        out_of_memory: number of times that memory ran out and a window was run again.
        amp_enabled, final_loss_scale: whether autocast was on, and the gradient scaler's last scale, if any.
        audits: one entry per audit, with the attributes of `AuditEntry`.
        noise_scale: the last estimate of the gradient noise scale, if it was measured; docs/noise_scale.md lists its
            keys.
        output_dir: the folder of the ledger, result and model, if any.
        unwritten: a sentence for each of these that could not be written, and for a model that could not be uploaded.
        interrupted: whether the run has not reached its end. The model has the weights of the last update, and
            `final_loss` is the last validation loss so far (without validation data, the training loss of the last
            complete epoch), or NaN. In a loaded result of such a run, `training_time` is NaN.
        restored_update: number of updates that the model's weights have had, if the run restored the best ones.

    `model`, which is not part of the mapping or of the file, is the trained model in memory.
    """

    final_loss: float
    initial_loss: float
    best_val_loss: float | None
    loss_history: list[float]
    grad_norm_history: list[float]
    lr_history: list[float]
    train_loss_history: list[float]
    val_loss_history: list[float]
    metrics: list[dict[str, float]]
    optimizer_steps: int
    skipped_steps: int
    effective_batch_size: int
    batch_size: int
    gradient_accumulation_steps: int
    num_processes: int
    training_time: float
    samples_per_second: float
    tokens_per_second: float | None
    padding_fraction: float | None
    passes_per_update: float
    out_of_memory: int
    amp_enabled: bool
    final_loss_scale: float | None
    output_dir: str | None
    evaluation_updates: list[int] = field(default_factory=list)
    best_update: int | None = None
    accumulation_schedule: list[list[int]] | None = None
    audits: list[dict[str, Any]] = field(default_factory=list)
    unwritten: list[str] = field(default_factory=list)
    interrupted: bool = False
    restored_update: int | None = None
    short_updates: list[int] = field(default_factory=list)
    noise_scale: dict[str, Any] | None = None
    initial_metrics: dict[str, float] = field(default_factory=dict)

    # Not a field, so that comparing, printing, saving and copying the numbers leaves the model out.
    _trained: ClassVar[TrainedModel | None] = None
    _recorded: ClassVar[Recorded | None] = None  # of a run without `output_dir`, for reports

    @classmethod
    def of(
        cls,
        ledger: Ledger,
        batch_sizes: BatchSizes,
        criterion: Criterion,
        *,
        training_time: float,
        out_of_memory: int,
        amp_enabled: bool,
        final_loss_scale: float | None,
        output_dir: str | None,
        interrupted: bool = False,
    ) -> "Result":
        """Build the result from the ledger of a run with at least one update."""
        windows, epochs, skipped = ledger.windows, ledger.epochs, sum(w.skipped for w in ledger.windows)
        initial = next((e for e in ledger.evaluations if not e.evaluation), None)
        evaluations = [e for e in ledger.evaluations if e.evaluation]
        lowest, best = Criterion().best(evaluations), criterion.best(evaluations)
        last, padding = batch_sizes.at(len(windows) - 1), padding_share(windows)
        stages = [[update, sizes.gradient_accumulation_steps] for update, sizes in batch_sizes.stages()]
        return cls(
            final_loss=evaluations[-1].val_loss if evaluations else epochs[-1].train_loss if epochs else math.nan,
            initial_loss=windows[0].loss if initial is None else initial.val_loss,
            best_val_loss=None if lowest is None else lowest.val_loss,
            best_update=None if best is None else best.evaluation,
            loss_history=[w.loss for w in windows],
            grad_norm_history=[w.grad_norm for w in windows],
            lr_history=[w.learning_rate for w in windows],
            train_loss_history=[e.train_loss for e in epochs],
            val_loss_history=[e.val_loss for e in evaluations],
            metrics=[e.metrics for e in evaluations],
            evaluation_updates=[e.evaluation for e in evaluations],
            optimizer_steps=len(windows) - skipped,
            skipped_steps=skipped,
            effective_batch_size=last.effective_batch_size,
            batch_size=batch_sizes.batch_size,
            gradient_accumulation_steps=last.gradient_accumulation_steps,
            num_processes=batch_sizes.num_processes,
            training_time=training_time,
            samples_per_second=mean_speed(windows, "rows"),
            tokens_per_second=mean_speed(windows, "tokens") if padding is not None else None,
            padding_fraction=padding,
            passes_per_update=sum(w.passes for w in windows) / len(windows),
            out_of_memory=out_of_memory,
            amp_enabled=amp_enabled,
            final_loss_scale=final_loss_scale,
            output_dir=output_dir,
            accumulation_schedule=stages if batch_sizes.later else None,
            audits=[dict(vars(audit)) for audit in ledger.audits],
            interrupted=interrupted,
            initial_metrics={} if initial is None else initial.metrics,
            noise_scale=summarize([vars(entry) for entry in ledger.noise_scales]),
            short_updates=[w.window + 1 for w in windows if w.rows < batch_sizes.at(w.window).effective_batch_size],
        )

    def __getitem__(self, name: str) -> Any:
        if name not in _RESULT_NAMES:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(_RESULT_NAMES)

    def __len__(self) -> int:
        return len(_RESULT_NAMES)

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        """Return the table that `str` gives, as HTML for notebooks."""
        return as_html(self)

    def to_frame(self, kind: str = "updates") -> "pd.DataFrame":
        """Return the histories as a pandas DataFrame, indexed by the number of updates so far.

        Args:
            kind: "updates" for a row per update, or "evaluations" for a row per evaluation.

        Raises:
            SettingsError: if `kind` is something else.
        """
        return as_frame(self, kind)

    def report(self, path: str | Path | None = None) -> Path:
        """Write a page with the curves, results and settings of the run, and return its path.

        The page is one HTML file that needs no network. It is made from the ledger in `output_dir` or, without a
        folder, in memory; a copied or loaded result without either has only the histories. On several processes, only
        the main one writes.

        Args:
            path: the file to write; None for `report.html` in `output_dir`.

        Raises:
            SettingsError: if `path` is None and there is no `output_dir`, or if matplotlib is missing.
            OSError: if the file cannot be written.
        """
        return report_result(self, path, self._recorded)

    def plot(self) -> "Figure":
        """Return the curves of the report as a matplotlib figure, for notebooks.

        Raises:
            SettingsError: if matplotlib is missing.
        """
        return plot_result(self, self._recorded)

    @property
    def model(self) -> Any:
        """The trained model, which is the module that was passed in, with the best weights if the run restored them.

        None if the result was loaded, copied or unpickled.
        """
        return None if self._trained is None else self._trained.model

    def with_model(self, model: Any, tokenizer: Any = None) -> "Result":
        """Return the result with a trained model, and a tokenizer to save with it."""
        return with_trained(self, TrainedModel(model, tokenizer), self._recorded)

    def without_model(self) -> "Result":
        """Return the result without the model, so that the model's memory can be freed."""
        return with_trained(self, None, self._recorded)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name in _RESULT_NAMES}

    def save_model(self, path: str | Path, *, merge: bool = False) -> None:
        """Write the trained model, its tokenizer if it has one, and a model card, for `from_pretrained` to read.

        An existing folder is replaced only when the new one is complete. On several processes, only the main one
        writes. If they train with sharding, all of them must call this, because they gather the weights together.

        Args:
            path: the folder to write.
            merge: whether to write a PEFT model as a plain model, with its adapters merged. The model in memory keeps
                its adapters.

        Raises:
            SettingsError: if the result has no model, because it was loaded from a file, copied or unpickled; or if
                there are no adapters to merge, or they are those of a sharded model.
            OSError: if the folder cannot be written.
        """
        save_trained(self, self._trained, Path(path), merge=merge)

    def save(self, path: str | Path) -> None:
        """Write the result as JSON, with non-finite numbers as null.

        An existing file is replaced only when the new one is complete.
        """
        write_values(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "Result":
        """Read a file that `save` wrote, or the result of a run from its output folder.

        For a run that was interrupted or has not ended yet, or whose `result.json` is lost, the result is built from
        its ledger. A null in a history becomes NaN, also if it was an infinity. Newer names are left out.

        Raises:
            DataError: if the file is not a result, or if the ledger is needed but damaged or without an update.
        """
        if (found := read_without_result(RunDir(Path(path)))) is not None:
            ledger, record = found
            return cls.of(
                ledger,
                record.batch_sizes(),
                record.criterion(),
                training_time=math.nan,
                out_of_memory=0,
                amp_enabled=record.amp_enabled,
                final_loss_scale=None,
                output_dir=str(path),
                interrupted=not record.finished,
            )
        return read_result(Path(path), _RESULT_NAMES, cls)


def with_trained(result: Result, trained: TrainedModel | None, recorded: Recorded | None) -> Result:
    """Return a result with a trained model, what is saved with it, and what the run has recorded in memory, if any."""
    result = replace(result)
    object.__setattr__(result, "_trained", trained)
    object.__setattr__(result, "_recorded", recorded)
    return result


_RESULT_NAMES = tuple(f.name for f in fields(Result))
