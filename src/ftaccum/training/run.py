"""One run of training, from its configuration to its result."""

from dataclasses import replace
from functools import partial

from ..checkpoint.manager import Interrupted
from ..data.prefetch import LocalWindow
from ..errors import CallbackError, DataError, DivergedError, InexactLossError, MetricsError, SettingsError
from ..runtime.log import logger
from ..runtime.memory import AgreedOutOfMemoryError
from ..tracking.console import describe_outputs
from ..tracking.export import write_model, write_outputs
from ..tracking.result import Result, with_trained
from ..tracking.step import StepResult
from .build_outputs import RunWithOutputs
from .build_plan import describe_cut
from .callbacks import Callback
from .card_metadata import gather_metadata
from .config import RunConfig
from .loop import LoopHooks, PassesDifferError
from .nonfinite import NonFiniteUpdate
from .trainer_callbacks import Requests

_NOT_TRAINING = (
    "This happened before the first update of this call or after its last one. To continue from the newest checkpoint "
    "in `output_dir`, if there is one, make the same call with `resume='auto'` (`--resume auto`)."
)


def run_training(config: RunConfig, callback: Callback | None = None, *, returns_interrupted: bool = False) -> Result:
    """Train a model, or continue an interrupted run. See `test_fine_tuning` for the arguments and errors.

    Args:
        config: the configuration of the run.
        callback: follows the run and may end it.
        returns_interrupted: whether to return the result so far after Ctrl-C, instead of raising KeyboardInterrupt.
    """
    with TrainingRun(config, callback or Callback()) as run:
        return run.train(returns_interrupted=returns_interrupted)


class TrainingRun(RunWithOutputs):
    """A run that trains its model in place."""

    _is_training = False

    def train(self, *, returns_interrupted: bool) -> Result:
        """Train to the end of the run and write its outputs.

        Args:
            returns_interrupted: whether to return the result so far after Ctrl-C.
        """
        self._announce()
        self._restore()
        self._is_training = self.keeps_adapters = True
        try:
            self._train_epochs()
        except InexactLossError as error:
            remedy = [] if isinstance(error, PassesDifferError) else ["Set `on_inexact='warn'` to train anyway."]
            raise InexactLossError([*error.faults, *self._keep_inexact(), *remedy]) from error
        except Interrupted:
            if not (returns_interrupted and self.metrics_logger.n_windows):
                raise
            return self._interrupted_result()
        self._is_training = False
        self.metrics_logger.log()
        self.weights_in_training.close()
        restored = self.best.restore()
        if restored is not None:
            self.evaluated.take(self.model)
        self.callback_handler.end(restored_best=restored is not None)
        is_evaluated = not self.evaluated.differ_from(self.model)
        result = replace(self._result(), restored_update=restored)
        self._inner.close()  # before saving, restore the model's mode and remove wrappers
        saves = self.callback.saves_model
        metadata = gather_metadata(self, result, is_evaluated=is_evaluated) if saves else None
        trained = replace(self.trained_model, metadata=metadata)
        saved = trained if saves else None
        result = write_outputs(result, self.metrics_logger.ledger, saved, self.run_dir, self.process_group)
        result = with_trained(self._publish(result), trained, self._recorded())
        try:
            self.callback_handler.settle()
        except CallbackError as error:
            error.result = result
            raise
        if not result.unwritten:
            self._finish()
        self.accelerator.wait_for_everyone()
        self.console.result(result)
        return result

    def _interrupted_result(self) -> Result:
        """Return the result so far of a run that a user at a prompt has stopped, whose next input can use the model."""
        self.metrics_logger.drain()
        self.weights_in_training.close()
        result = replace(self._result(), interrupted=True)
        self._inner.close()
        self.console.result(result)
        metadata = gather_metadata(self, result, f"Training was interrupted after update {len(result.loss_history)}.")
        return with_trained(result, replace(self.trained_model, metadata=metadata), self._recorded())

    def _keep_inexact(self) -> list[str]:
        """Save the model of a run that an inexact gradient has ended; return sentences that say where it is saved."""
        self.checkpoint_manager.finish_writing()
        n_updates, saved = self.metrics_logger.n_windows, self.checkpoint_manager.describe()
        self.weights_in_training.close()
        if not n_updates or self.run_dir is None or not self.callback.saves_model:
            self._inner.close()
            return [f"The model in memory has had {n_updates} updates."]
        self.metrics_logger.drain()
        result = replace(self._result(), interrupted=True)
        self._inner.close()
        why = f"Training ended after update {n_updates}: accumulating the next gradient was not exact."
        trained = replace(self.trained_model, metadata=gather_metadata(self, result, why))
        faults = write_model(trained, self.run_dir, self.process_group)
        kept = faults or [f"The model after {n_updates} updates is in {self.run_dir.model}."]
        return [*kept, saved] if saved else kept

    def describe_progress(self) -> str:
        if not self._is_training:
            return _NOT_TRAINING
        return f"{self.metrics_logger.n_windows} updates are complete. {self.checkpoint_manager.describe()}"

    def _announce(self) -> None:
        """Print the banner, and log where the run resumes."""
        _ = self.resume_point  # refuses a checkpoint of another run before the data are loaded
        _ = self.repository  # refuses a repository that cannot be written to
        data, plan = self.data, self.plan
        knows_lengths = data.train.knows_lengths
        cut = describe_cut(self.config.runtime, self.batch_sizes, self.planner, knows_lengths=knows_lengths)
        precision, device = self.accelerator.mixed_precision, self.accelerator.device.type
        command, folder = self.config.command, None if self.run_dir is None else self.run_dir.path
        outputs = describe_outputs(folder, None if command is None else command.resume)
        self.console.banner(plan, [*data.notes(), *self.notes, cut], self.n_warmup, precision, device, outputs)
        if command is not None and command.note:
            logger.info(command.note)
        if message := self.resumed[1].describe(self.identity, plan.n_windows):
            logger.info(message)

    def _restore(self) -> None:
        """Restore the state of a resumed run, or evaluate a new one before its first update."""
        _ = self.loop  # wraps the model, which must happen before its state is restored
        _ = self.evaluation  # refuses metrics that would take too much memory, also in a resumed run
        resume_point, ledger = self.resumed[1], self.metrics_logger.ledger
        self.callback_handler.send("on_init_end")
        resume_point.restore(self.state, self.criterion)
        self.loss_state.renew()  # restored buffers are no change
        _ = self.checkpoint_manager  # from here on, signals wait for the end of an update
        if resume_point.path is None:
            self.evaluator.before_training()
        elif ledger.evaluations:
            self.criterion.check(dict.fromkeys(name for entry in ledger.evaluations for name in entry.metrics))
        for entry in ledger.evaluations:
            if entry.evaluation:
                self.callback.on_evaluation(entry)
        n_updates = self.metrics_logger.n_windows
        best = self.criterion.best(ledger.evaluations)
        self.callback_handler.begin(n_updates, self.plan.epochs_after(n_updates), best, self.criterion)
        if self.process_group.is_main:  # after everything that may fail
            self._open_files(ledger)
        resume_point.restore_generators(self.state, self.config.recipe.random_seed)

    def _train_epochs(self) -> None:
        for epoch in self.plan.epochs:
            if epoch < self.metrics_logger.n_epochs:  # this epoch had ended before the run was interrupted
                for _ in self.plan.windows(epoch, self.metrics_logger.n_windows):
                    pass  # read a stream up to the next epoch
            elif not self._stops or self.metrics_logger.is_in_epoch:
                self._train_epoch(epoch)
        self.evaluator.after_epoch(always=True, requested=False)  # a stream may end before that is known
        self.callback_handler.settle()
        if self.best.stops:
            logger.info(self.best.describe_stop())
        elif self.callback_handler.stops:
            logger.info(f"A callback stopped the run after update {self.metrics_logger.n_windows}.")
        elif shortfall := self.plan.shortfall():
            logger.warning(shortfall)

    def _train_epoch(self, epoch: int) -> None:
        with self.checkpoint_manager.saved_on(self._agreed_errors, lambda: not self.loop.in_update):
            if not self.metrics_logger.is_in_epoch:
                self.callback_handler.send("on_epoch_begin")
            if self.evaluator.after_update(requested=False):  # an error ended the earlier run before this
                self.callback_handler.settle()
            if not self._stops:
                windows = self.window_loader.epoch(epoch, self.metrics_logger.n_windows)
                self.loop.train(windows, self._loop_hooks())
            requests = self._end_epoch(epoch)
        entry = self.metrics_logger.epoch()
        if self.evaluation is None:
            self.console.epoch(entry, self.plan)
        if self.checkpoint_manager.after_epoch(requested=requests.save):
            self.callback_handler.saved()
            self.callback_handler.settle()

    def _end_epoch(self, epoch: int) -> Requests:
        """Evaluate at the end of an epoch, if that is due, and return what callbacks request."""
        self.callback_handler.send("on_epoch_end")
        requests = self.callback_handler.settle()
        if requests.log:
            self.metrics_logger.log()
        is_last = self._is_last(epoch)
        self.evaluator.after_epoch(always=self.evaluates_at_epochs or is_last, requested=requests.evaluate)
        return requests | self.callback_handler.settle()

    def _is_last(self, epoch: int) -> bool:
        """Return whether training ends with this epoch, as far as that is known."""
        has_all_updates = self.metrics_logger.n_windows >= self.plan.n_windows
        return has_all_updates or epoch == self.plan.n_epochs - 1 or self._stops

    def _loop_hooks(self) -> LoopHooks:
        send = self.callback_handler.send
        self.accumulator.after_pass = partial(send, "on_substep_end")
        return LoopHooks(
            self.oom_recovery.split,
            self._before_update,
            self._after_update,
            self._before_step,
            partial(send, "on_optimizer_step"),
        )

    def _before_step(self) -> None:
        self.loss_state.passed()
        if self.config.components.callbacks:
            self.gradients.show()
        self.callback_handler.send("on_pre_optimizer_step")

    def _before_update(self, window: LocalWindow) -> LocalWindow:
        state = self.loss_state  # taken before callbacks of the first update can change it
        self.callback_handler.begin_step()
        if self.process_group.any(state.look()):  # since the window was read ahead and counted
            window = self.window_loader.counted_again(window)
        self.audits.before_update(self.audited_window(window))
        return window

    def _after_update(self, result: StepResult, non_finite: NonFiniteUpdate | None) -> bool:
        """Record an update, do what is due after it, and return whether training goes on."""
        n_updates = self.metrics_logger.n_windows + 1
        self.callback_handler.end_step(n_updates, self.plan.epochs_after(n_updates))
        self.metrics_logger.window(result)
        self.oom_recovery.window_done()
        requests = self.callback_handler.settle()
        if requests.log:
            self.metrics_logger.log()
        if self.evaluator.after_update(requested=requests.evaluate):
            requests |= self.callback_handler.settle()
        self.nonfinite.window_done(non_finite)
        if self.checkpoint_manager.after_update(improved=self.evaluator.improved, requested=requests.save):
            self.callback_handler.saved()
            self.callback_handler.settle()
        return not self._stops

    @property
    def _stops(self) -> bool:
        """Whether training stops before the end of its plan."""
        return self.best.stops or self.callback_handler.stops

    @property
    def _agreed_errors(self) -> tuple[type[Exception], ...]:
        """The types of errors that are raised on all processes together."""
        on_all = (CallbackError, DataError, DivergedError, MetricsError, SettingsError, AgreedOutOfMemoryError)
        return (Exception,) if self.process_group.is_single else on_all
