"""The files of a training run besides its checkpoints: its record, its ledger and its result."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from ..errors import OutputWarning, warn_user
from ..insight.run_metadata import Named
from ..runtime.log import logger
from ..runtime.run_dir import RunDir
from ..tracking.hub import check_hub
from ..tracking.ledger import Ledger
from ..tracking.publishing import publish
from ..tracking.recorded import Recorded
from ..tracking.result import Result
from ..tracking.run_record import RunRecord
from .build_evaluation import EvaluatedSetup
from .build_identity import build_record
from .named_sources import base_model

_NOT_REPEATABLE = (
    "`train_data` or `data_collator` uses its own random number generator, whose state is not saved in checkpoints. A "
    "resumed run will get other random numbers than an uninterrupted one. To make it repeatable, use the global "
    "generators of `random`, `numpy.random` or `torch`."
)


def _warn_of_replaced(run_dir: RunDir, resumed_from: Path | None) -> None:
    """Warn if the folder holds a finished run that the new one does not continue."""
    if resumed_from is not None and run_dir.path.resolve() in resumed_from.resolve().parents:
        return
    earlier = RunRecord.read(run_dir.record)
    if earlier is not None and earlier.finished:
        logger.warning(f"Replaces the finished run in {str(run_dir.path)!r}: {earlier.describe_subject()}.")


class RunWithOutputs(EvaluatedSetup):
    """The components of a training run, with those that describe it in files."""

    _record: RunRecord | None = None  # what `run.json` has; only on the main process

    @cached_property
    def base(self) -> Named | None:
        """The model that is fine-tuned, if it has a name: a folder only as seen from the first working folder."""
        return base_model(self.config)

    @cached_property
    def repository(self) -> str | None:
        """The full name of the repository on the hub, once it is sure that it can be written to; None without one."""
        name = self.config.runtime.push_to_hub
        if name is None or not self.callback.saves_model:
            return None
        return self.process_group.run_on_main(lambda: check_hub(name))

    def _open_files(self, ledger: Ledger) -> None:
        """Open the ledger, and set aside newer checkpoints that the run does not continue from.

        This runs on the main process only. It must build no component, because the other processes would not.
        """
        _ = self.base  # a callback may change the working folder, from which the model was loaded
        if self.callback.saves_model:  # a search records its trials itself
            self._record = build_record(
                self.config, self.data, self.batch_sizes, self.accelerator, self.measured_windows, self.optimizer
            )
        if self.run_dir is None or self.checkpoints is None:
            return
        ledger.keep_in(self.run_dir.ledger)
        ledger.catch_up()
        if self._record is not None:
            _warn_of_replaced(self.run_dir, self.resume_point.path)
            self._record.write(self.run_dir.record)
        self.checkpoints.set_aside(self.resume_point.path, self.resume_point.damaged)
        if not self.data.train.repeats:
            logger.warning(_NOT_REPEATABLE)

    def _publish(self, result: Result) -> Result:
        """Upload the saved model, if asked to. If that fails, warn, and add a sentence to the result."""
        repository, run_dir = self.repository, self.run_dir
        if repository is None or run_dir is None:
            return result
        unwritten = self.process_group.run_long_on_main(lambda: publish(result, run_dir, repository))
        if self.process_group.is_main:
            for fault in unwritten[len(result.unwritten) :]:
                warn_user(fault, OutputWarning)
        return replace(result, unwritten=unwritten)

    def _recorded(self) -> Recorded | None:
        """Return what a run without a folder has recorded in memory; None if a folder has it."""
        return Recorded(self.metrics_logger.ledger, self._record) if self.run_dir is None else None

    def _finish(self) -> None:
        """Record that the run has finished, and remove the checkpoints that it no longer needs."""
        if self._record is None or self.run_dir is None:
            return
        # Record it first: without checkpoints and record, `resume='auto'` would start again and replace the model.
        if replace(self._record, finished=True).write(self.run_dir.record):
            self.checkpoint_manager.finish(keeps=self.config.runtime.keep_checkpoints > 0)

    def _result(self) -> Result:
        scaler = self.accelerator.scaler
        return Result.of(
            self.metrics_logger.ledger,
            self.batch_sizes,
            self.criterion,
            training_time=self.metrics_logger.seconds,
            out_of_memory=self.oom_recovery.limits.failures,
            amp_enabled=self.accelerator.mixed_precision != "no",
            final_loss_scale=None if scaler is None else scaler.get_scale(),
            output_dir=None if self.run_dir is None else str(self.run_dir.path),
        )
