"""One run of training, from its configuration to its result."""

import math

import torch
from accelerate import Accelerator

from ..errors import DataError, DivergedError, InexactLossError, MetricsError
from ..runtime.log import logger
from ..runtime.memory import AgreedOutOfMemoryError
from ..runtime.optimizers import evaluation_weights
from ..tracking.export import write_model, write_outputs
from ..tracking.ledger import EpochEntry, Ledger
from ..tracking.result import Result
from ..tracking.step import StepResult
from ..tracking.throughput import Throughput
from .build_plan import describe_cut
from .build_run import TrainingSetup
from .callbacks import Callback
from .config import RunConfig
from .nonfinite import NonFiniteUpdate

_NOT_TRAINING = (
    "This happened before the first update of this call or after its last one. To continue from the newest checkpoint "
    "in `output_dir`, if there is one, make the same call with `resume='auto'`."
)
_NOT_REPEATABLE = (
    "`train_data` or `data_collator` uses its own random number generator, whose state is not saved in checkpoints. A "
    "resumed run will get other random numbers than an uninterrupted one. To make it repeatable, use the global "
    "generators of `random`, `numpy.random` or `torch`."
)


def run_training(config: RunConfig, callback: Callback | None = None) -> Result:
    """Train a model, or continue an interrupted run. See `test_fine_tuning` for the arguments and errors.

    Args:
        config: the configuration of the run.
        callback: follows the run and may end it.
    """
    with TrainingRun(config, callback or Callback()) as run:
        return run.train()


class TrainingRun(TrainingSetup):
    """A run that trains its model in place."""

    _is_training = False

    def train(self) -> Result:
        """Train to the end of the run and write its outputs."""
        self._announce()
        self._restore()
        self._is_training = True
        try:
            self._train_epochs()
        except InexactLossError as error:
            raise InexactLossError([*error.faults, *self._keep_inexact()]) from error
        self._is_training = False
        self.weights_in_training.close()
        if self.best.restore(self.model):
            logger.info(f"Restored the weights of the epoch with validation loss {self.best.loss:.4f}.")
        result = self._result()
        self._inner.close()  # before saving, restore the model's mode and remove wrappers
        saved = self.model if self.callback.saves_model else None
        ledger, tokenizer = self.metrics_logger.ledger, self.config.components.tokenizer
        result = write_outputs(result, ledger, saved, tokenizer, self.run_dir, self.process_group)
        self.accelerator.wait_for_everyone()
        self.console.result(result)
        return result

    def _keep_inexact(self) -> list[str]:
        """Save the model of a run that an audit has ended, and return sentences that say where it is saved."""
        n_updates, saved = self.metrics_logger.n_windows, self.checkpoint_manager.describe()
        self.weights_in_training.close()
        self._inner.close()
        if not n_updates or self.run_dir is None or not self.callback.saves_model:
            return [f"The model in memory has had {n_updates} updates.", "Set `on_inexact='warn'` to train anyway."]
        faults = write_model(self.model, self.config.components.tokenizer, self.run_dir, self.process_group)
        kept = faults or [f"The model after {n_updates} updates is in {self.run_dir.model}."]
        return [*kept, saved, "Set `on_inexact='warn'` to train anyway."]

    def describe_progress(self) -> str:
        if not self._is_training:
            return _NOT_TRAINING
        return f"{self.metrics_logger.n_windows} updates are complete. {self.checkpoint_manager.describe()}"

    def _announce(self) -> None:
        """Print the banner, and log where the run resumes."""
        _ = self.resume_point  # refuses a checkpoint of another run before the data are loaded
        data, plan = self.data, self.plan
        knows_lengths = data.train.knows_lengths
        cut = describe_cut(self.config.runtime, self.batch_sizes, self.planner, knows_lengths=knows_lengths)
        precision, device = self.accelerator.mixed_precision, self.accelerator.device.type
        self.console.banner(plan, [*data.notes(), *self.notes, cut], self.n_warmup, precision, device)
        if message := self.resumed[1].describe(self.identity, plan.n_windows):
            logger.info(message)

    def _restore(self) -> None:
        """Restore the state of a resumed run, or evaluate a new one before its first update."""
        _ = self.loop  # wraps the model, which must happen before its state is restored
        resume_point, ledger = self.resumed[1], self.metrics_logger.ledger
        resume_point.restore(self.state)  # before any file changes, since it may fail
        if self.process_group.is_main:
            self._open_files(ledger)
        _ = self.checkpoint_manager  # from here on, signals wait for the end of an update
        if resume_point.path is None:
            # This also lets a faulty metric fail now and not after the first epoch.
            ledger.initial_val_loss, metrics = self.evaluate()
            self.console.epoch(EpochEntry(-1, math.nan, ledger.initial_val_loss, metrics), self.plan.n_epochs)
        resume_point.restore_generators(self.state, self.config.recipe.random_seed)

    def _open_files(self, ledger: Ledger) -> None:
        """Open the ledger, and set aside newer checkpoints that the run does not continue from.

        This runs on the main process only. It must build no component, because the other processes would not.
        """
        if self.run_dir is None or self.checkpoints is None:
            return
        ledger.keep_in(self.run_dir.ledger)
        ledger.catch_up()
        self.checkpoints.set_aside(self.resume_point.path, self.resume_point.damaged)
        if not self.data.train.repeats:
            logger.warning(_NOT_REPEATABLE)

    def _train_epochs(self) -> None:
        for epoch in self.plan.epochs:
            if epoch < self.metrics_logger.n_epochs:  # this epoch had ended before the run was interrupted
                for _ in self.plan.windows(epoch, self.metrics_logger.n_windows):
                    pass  # read a stream up to the next epoch
            elif self.best.has_ended:
                return
            else:
                self._train_epoch(epoch)
        if shortfall := self.plan.shortfall():
            logger.warning(shortfall)

    def _train_epoch(self, epoch: int) -> None:
        with self.checkpoint_manager.saved_on(self._agreed_errors, lambda: not self.loop.in_update):
            windows = self.window_loader.epoch(epoch, self.metrics_logger.n_windows)
            with self.metrics_logger.throughput.timed():
                self.loop.train(windows, self.audits.before_update, self.oom_recovery.split, self._on_step)
            val_loss, metrics = self.evaluate()
        entry = self.metrics_logger.epoch(val_loss, metrics)
        self.console.epoch(entry, self.plan.n_epochs)
        self.milestones.epoch_done(entry)
        with evaluation_weights(self.optimizer):
            ended = self.best.ends_after(entry.val_loss, self.model, updated=self.plan.n_windows_of(epoch) > 0)
        if ended:
            logger.info(self.best.describe())
        self.checkpoint_manager.after_epoch()

    def _on_step(self, result: StepResult, non_finite: NonFiniteUpdate | None) -> None:
        self.metrics_logger.window(result)
        self.oom_recovery.window_done()
        self.milestones.window_done()
        self.nonfinite.window_done(non_finite)
        self.checkpoint_manager.after_update()

    @property
    def _agreed_errors(self) -> tuple[type[Exception], ...]:
        """The types of errors that are raised on all processes together."""
        on_all = (DataError, DivergedError, InexactLossError, MetricsError, AgreedOutOfMemoryError)
        return (Exception,) if self.process_group.is_single else on_all

    def _result(self) -> Result:
        scaler = self.accelerator.scaler
        return Result.of(
            self.metrics_logger.ledger,
            self.batch_sizes,
            work=_over_processes(self.metrics_logger.throughput, self.accelerator),
            training_time=self.metrics_logger.seconds,
            out_of_memory=self.oom_recovery.limits.failures,
            amp_enabled=self.accelerator.mixed_precision != "no",
            final_loss_scale=None if scaler is None else scaler.get_scale(),
            output_dir=None if self.run_dir is None else str(self.run_dir.path),
        )


def _over_processes(throughput: Throughput, accelerator: Accelerator) -> Throughput:
    counts = [throughput.rows, throughput.tokens, throughput.positions, throughput.passes]
    summed = accelerator.reduce(torch.tensor(counts, device=accelerator.device), "sum")
    rows, tokens, positions, passes = summed.tolist()
    return Throughput(rows, tokens, positions, passes, throughput.seconds)
