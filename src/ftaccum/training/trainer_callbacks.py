"""Call Transformers' `TrainerCallback` objects at the events of a run."""

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import CallbackError
from ..insight.curves import with_loss
from ..runtime.process_group import ProcessGroup
from ..runtime.state_guards import preserve_rng, training_mode
from ..tracking.ledger import EvaluationEntry
from ..tracking.selection import Criterion
from .callback_states import restore_states, states_of

_RUN = "TrainerState"
# Parts of the state of a run that are given anew by the call that resumes it.
_OF_THIS_CALL = {
    *("is_local_process_zero", "is_world_process_zero", "max_steps", "num_train_epochs", "logging_steps"),
    *("eval_steps", "save_steps", "train_batch_size", "stateful_callbacks"),
}


def fault_of_callbacks(callbacks: Any) -> str | None:
    """Return a message that says why `callbacks` cannot be used, or None if they can."""
    if not isinstance(callbacks, list | tuple):
        return (
            f"`callbacks` must be a list of `transformers.TrainerCallback` objects, but is {callbacks!r} instead. Put "
            "it in a list, also a single one."
        )
    classes = [each for each in callbacks if isinstance(each, type)]
    strays = [each for each in callbacks if not isinstance(each, TrainerCallback)]
    if classes:
        return f"`callbacks` contains the class {classes[0].__name__}. Give an object: `{classes[0].__name__}()`."
    if strays:
        return (
            f"`callbacks` must contain only `transformers.TrainerCallback` objects, but contains {strays[0]!r}. Derive "
            "its class from `transformers.TrainerCallback`."
        )
    return None


@dataclass(frozen=True)
class Requests:
    """The requests of the callbacks on all processes since the last update."""

    log: bool = False
    evaluate: bool = False
    save: bool = False

    def __or__(self, other: "Requests") -> "Requests":
        return Requests(self.log or other.log, self.evaluate or other.evaluate, self.save or other.save)


class CallbackHandler:
    """Calls the callbacks of a run, and agrees with the other processes on what they request.

    An error in a callback is kept until the current update is complete. Then all processes raise it together.

    Attributes:
        stops: whether a callback of any process has stopped the run.
    """

    def __init__(
        self,
        callbacks: Sequence[TrainerCallback],
        process_group: ProcessGroup,
        arguments: TrainingArguments,
        state: TrainerState,
        objects: Mapping[str, Any],
        independent_passes: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Create a handler.

        Args:
            arguments: the settings of the run.
            state: the progress of the run, which this handler updates.
            objects: the keyword arguments of all events: the model, the optimizer, and so on.
            independent_passes: returns a context in which each process may run any number of passes without gradients.
        """
        self._independent_passes = independent_passes
        self._callbacks, self._process_group = callbacks, process_group
        self._arguments, self._state, self._objects = arguments, state, objects
        self._control = TrainerControl()
        self._failure: Exception | None = None
        self._failed: list[TrainerCallback] = []
        self.stops = False

    @property
    def has_callbacks(self) -> bool:
        return bool(self._callbacks)

    def send(self, event: str, **more: Any) -> None:
        """Call the method of this name of each callback. One that has raised an error gets no more calls.

        A callback with a true attribute `runs_model` may run a sharded model in `on_evaluate` on any of the processes.

        The modes of the model's modules, train or eval, are restored afterwards. As with `Trainer`, `on_evaluate` gets
        a model in eval mode.

        Args:
            more: further keyword arguments, such as `logs` or `metrics`.
        """
        if not self._callbacks:
            return
        model: nn.Module = self._objects["model"]
        for callback in self._callbacks:
            runs_model = event == "on_evaluate" and getattr(callback, "runs_model", False)
            with self._independent_passes() if runs_model else nullcontext():
                if any(callback is failed for failed in self._failed):
                    continue  # the others go on: their state must include the current update, which is completed
                with training_mode(model, training=False if event == "on_evaluate" else None):
                    self._call(callback, event, more)

    def _call(self, callback: TrainerCallback, event: str, more: Mapping[str, Any]) -> None:
        """Call a method of a callback, and keep its error if it is the first one."""
        method = getattr(callback, event)
        try:
            control = method(self._arguments, self._state, self._control, **self._objects, **more)
        except Exception as error:
            self._fail(callback, self._describe(callback, event, error))
            return
        self._control = control or self._control
        if self._control.should_epoch_stop:
            fault = CallbackError(
                f"The callback {type(callback).__name__} set `should_epoch_stop` in `{event}`, but the rows of all "
                "updates are planned ahead, so an epoch cannot end early. Set `should_training_stop` instead."
            )
            self._fail(callback, fault)

    def _fail(self, callback: TrainerCallback, error: Exception) -> None:
        """Keep the first error, to raise it once the current update is complete."""
        self._failed.append(callback)
        self._failure = self._failure or error

    def begin(self, n_updates: int, epoch: float, best: EvaluationEntry | None, criterion: Criterion) -> None:
        """Call the callbacks before the first update of this call.

        As with `Trainer`, a callback that stops the run here stops it after that update.

        Args:
            n_updates: number of updates that are done.
            epoch: number of epochs in these updates.
            best: the best of their evaluations, if any.
        """
        self._state.global_step, self._state.epoch = n_updates, epoch
        self._set_best(best, criterion)
        stops = self.stops
        self.send("on_train_begin")
        self.settle()
        self.stops = stops

    def end(self, *, restored_best: bool) -> None:
        """Call the callbacks after training.

        Args:
            restored_best: whether the model has the weights of the best evaluation.
        """
        self._arguments.load_best_model_at_end = restored_best
        self.send("on_train_end")

    def saved(self) -> None:
        """Call the callbacks after a checkpoint, whose random numbers they do not change."""
        with preserve_rng():
            self.send("on_save")

    def begin_step(self) -> None:
        control = self._control
        control.should_log = control.should_evaluate = control.should_save = False
        self.send("on_step_begin")

    def end_step(self, n_updates: int, epoch: float) -> None:
        self._state.global_step, self._state.epoch = n_updates, epoch
        self.send("on_step_end")

    def log(self, values: Mapping[str, float], n_updates: int) -> None:
        """Pass on an entry for the trackers."""
        if self._callbacks:
            logs = {**values, "epoch": self._state.epoch}
            self._state.log_history.append({**logs, "step": n_updates})
            self.send("on_log", logs=logs)

    def evaluated(self, entry: EvaluationEntry, best: EvaluationEntry | None, criterion: Criterion) -> None:
        """Pass on an evaluation, and then, as `Trainer` does, the best one so far."""
        if not self._callbacks:
            return
        values = with_loss(entry.val_loss, entry.metrics, "loss")
        metrics = {f"eval_{name.removeprefix('eval_')}": value for name, value in values.items()}
        self.log(metrics, entry.evaluation)
        self.send("on_evaluate", metrics={**metrics, "epoch": self._state.epoch})
        self._set_best(best, criterion)

    def settle(self) -> Requests:
        """Return the requests of the callbacks on all processes, which must call this together, between updates.

        Raises:
            CallbackError: on all processes, if a callback of one of them has raised an error.
        """
        if not self._callbacks:
            return Requests()
        control = self._control
        wanted = [self._failure is not None, control.should_training_stop, control.should_log]
        failed, stops, *flags = self._process_group.any_of([*wanted, control.should_evaluate, control.should_save])
        if failed:
            self._raise()
        control.should_log = control.should_evaluate = control.should_save = False
        self.stops = self.stops or stops
        return Requests(*flags)

    @contextmanager
    def evaluation_weights(self, model: nn.Module) -> Iterator[None]:
        """Give the model the weights that callbacks want to evaluate, until exit."""
        with ExitStack() as stack:
            for callback in self._callbacks:
                if (swap := getattr(callback, "evaluation_weights", None)) is not None:
                    stack.enter_context(swap(model))
            yield

    @property
    def endings(self) -> tuple[type[Exception], ...]:
        """The types of errors with which callbacks end a run for good, as when a trial is pruned."""
        return tuple(kind for callback in self._callbacks for kind in getattr(callback, "ends_run_with", ()))

    @property
    def changes_weights(self) -> bool:
        """Whether a callback evaluates other weights than those in training."""
        return any(hasattr(callback, "evaluation_weights") for callback in self._callbacks)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each callback that has one, by name, and the state of the run that all of them see.

        If taking a state raises an error, the error takes its place.
        """
        if not self._callbacks:
            return {_RUN: {"stops": True}} if self.stops else {}
        progress = {name: v for name, v in asdict(self._state).items() if name not in _OF_THIS_CALL}
        return {_RUN: {"stops": self.stops, **progress}, **states_of(self._callbacks)}

    def load_state_dict(self, state_dict: Mapping[str, Any], *, continues: bool = False) -> None:
        """Restore the states of callbacks, which are recognized by their classes and their order.

        Args:
            continues: whether a run that a callback stopped is to continue.
        """
        progress = dict(state_dict.get(_RUN, {}))
        self.stops = progress.pop("stops", False) and not continues
        vars(self._state).update(progress)
        restore_states(self._callbacks, {name: state for name, state in state_dict.items() if name != _RUN})

    def _describe(self, callback: TrainerCallback, event: str, error: Exception) -> Exception:
        """Return the error to raise for an error in a callback: the same one, if the callback declares it."""
        if isinstance(error, getattr(callback, "ends_run_with", ())):
            return error
        found = CallbackError(
            f"The callback {type(callback).__name__} raised in `{event}` after update {self._state.global_step}: "
            f"{type(error).__name__}: {error}"
        )
        found.__cause__ = error
        return found

    def _set_best(self, best: EvaluationEntry | None, criterion: Criterion) -> None:
        if best is not None:
            self._state.best_metric, self._state.best_global_step = criterion.value(best), best.evaluation

    def _raise(self) -> NoReturn:
        sent = self._failure
        try:
            pickle.dumps(sent)
        except Exception:
            sent = CallbackError(str(sent))
        failures = [each for each in self._process_group.gather(sent) if each is not None]
        raise self._failure or failures[0]
