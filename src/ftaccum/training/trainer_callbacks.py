"""Call Transformers' `TrainerCallback` objects at the events of a run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..errors import CallbackError
from ..runtime.process_group import ProcessGroup
from ..tracking.ledger import EvaluationEntry
from ..tracking.selection import Criterion


def fault_of_callbacks(callbacks: Any) -> str | None:
    """Return a message that says why `callbacks` cannot be used, or None if they can."""
    if not isinstance(callbacks, list | tuple):
        return f"`callbacks` must be a list of `transformers.TrainerCallback` objects, but is {callbacks!r} instead."
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
    """What callbacks of any process have requested since the last update."""

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
    ) -> None:
        """Create a handler.

        Args:
            arguments: the settings of the run.
            state: the progress of the run, which this handler updates.
            objects: the keyword arguments of all events: the model, the optimizer, and so on.
        """
        self._callbacks, self._process_group = callbacks, process_group
        self._arguments, self._state, self._objects = arguments, state, objects
        self._control = TrainerControl()
        self._failure: Exception | None = None
        self.stops = False

    def send(self, event: str, **more: Any) -> None:
        """Call the method of this name of each callback.

        Args:
            more: further keyword arguments, such as `logs` or `metrics`.
        """
        for callback in self._callbacks:
            if self._failure is not None:
                return
            method = getattr(callback, event)
            try:
                control = method(self._arguments, self._state, self._control, **self._objects, **more)
            except Exception as error:
                self._failure = self._describe(callback, event, error)
                return
            self._control = control or self._control
            if self._control.should_epoch_stop:
                self._failure = CallbackError(
                    f"The callback {type(callback).__name__} set `should_epoch_stop` in `{event}`, but the rows of all "
                    "updates are planned ahead, so an epoch cannot end early. Set `should_training_stop` instead."
                )

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

    def evaluated(self, entry: EvaluationEntry, criterion: Criterion) -> None:
        """Pass on an evaluation, and then update the best value so far."""
        if not self._callbacks:
            return
        metrics = {"eval_loss": entry.val_loss} | {f"eval_{name}": value for name, value in entry.metrics.items()}
        self.log(metrics, entry.evaluation)
        self.send("on_evaluate", metrics={**metrics, "epoch": self._state.epoch})
        state, value = self._state, criterion.value(entry)
        if state.best_metric is None or criterion.is_better(value, state.best_metric):
            state.best_metric, state.best_global_step = value, entry.evaluation

    def settle(self) -> Requests:
        """Return what callbacks of any process have requested. All processes must call this together, between updates.

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
                if (swap := _method(callback, "evaluation_weights")) is not None:
                    stack.enter_context(swap(model))
            yield

    @property
    def changes_weights(self) -> bool:
        """Whether a callback evaluates other weights than those in training."""
        return any(_method(callback, "evaluation_weights") is not None for callback in self._callbacks)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run that callbacks see, and the states of the callbacks that have one."""
        if not self._callbacks:
            return {}
        progress = {name: v for name, v in asdict(self._state).items() if name != "stateful_callbacks"}
        states = [_state_of(callback) for callback in self._callbacks]
        return {"stops": self.stops, "progress": progress, "callbacks": states}

    def load_state_dict(self, state_dict: Mapping[str, Any], *, continues: bool = False) -> None:
        """Restore the states of callbacks, by their classes and order.

        Args:
            continues: whether a run that a callback stopped is to continue.
        """
        if not (self._callbacks and state_dict):
            return
        self.stops = state_dict["stops"] and not continues
        for name, value in state_dict["progress"].items():
            if name not in ("is_local_process_zero", "is_world_process_zero", "max_steps", "num_train_epochs"):
                setattr(self._state, name, value)
        left = list(state_dict["callbacks"])
        for callback in self._callbacks:
            saved = next((each for each in left if each["class"] == _class_of(callback)), None)
            if saved is not None:
                left.remove(saved)
                _restore(callback, saved)

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

    def _raise(self) -> NoReturn:
        failures = [each for each in self._process_group.gather(self._failure) if each is not None]
        raise self._failure or failures[0]


def _method(callback: TrainerCallback, name: str) -> Callable[..., Any] | None:
    return getattr(callback, name, None)


def _class_of(callback: TrainerCallback) -> str:
    return f"{type(callback).__module__}.{type(callback).__qualname__}"


def _state_of(callback: TrainerCallback) -> dict[str, Any]:
    found: dict[str, Any] = {"class": _class_of(callback)}
    if (state_dict := _method(callback, "state_dict")) is not None:
        found["state_dict"] = state_dict()
    elif isinstance(callback, ExportableState):
        found["attributes"] = callback.state()["attributes"]
    return found


def _restore(callback: TrainerCallback, saved: Mapping[str, Any]) -> None:
    if (load := _method(callback, "load_state_dict")) is not None and "state_dict" in saved:
        load(saved["state_dict"])
    for name, value in saved.get("attributes", {}).items():
        setattr(callback, name, value)
