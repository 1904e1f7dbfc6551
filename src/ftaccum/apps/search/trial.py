"""A trial: a run that reports at its milestones, and its outcome."""

import math
import traceback
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...errors import CallbackError, DataError, DivergedError, Preempted, SettingsError
from ...planning.base_plan import BasePlan
from ...planning.plan import Plan
from ...runtime.memory import give_back_memory
from ...runtime.sharding.launcher import hidden_modes
from ...runtime.signals import StopSignals
from ...runtime.state_guards import preserve_rng, seed_all
from ...tracking.console import Console
from ...tracking.ledger import EpochEntry, EvaluationEntry
from ...tracking.progress import Progress
from ...tracking.result import Result
from ...tracking.selection import Criterion
from ...training.callbacks import Callback
from ...training.config import RunConfig
from ...training.run import run_training
from .processes import OutOfStepError, TrialProcesses
from .report_steps import milestones
from .space import COUPLED
from .trial_record import TrialRecord

_trained: weakref.WeakSet[Any] = weakref.WeakSet()  # models of trials that are still in memory


class PrunedError(Exception):
    """An error that ends the run of a pruned trial."""


class ReassignedError(Exception):
    """An error that ends a run because the trial was given to another worker."""


@dataclass(frozen=True)
class TrialResult:
    """The outcome of a trial on this process.

    Attributes:
        kind: "finished", "pruned", "diverged", "reassigned" or "failed".
        reason: why the trial did not finish; empty if it did.
        result: the result of a finished trial.
        value: the value of a finished trial, by which trials are compared; NaN otherwise.
        error: the error of a failed trial, if the user has to fix it.
    """

    kind: str
    reason: str = ""
    result: Result | None = None
    value: float = math.nan
    error: SettingsError | DataError | None = None


class TrialCallback(Callback):
    """A callback that reports milestones to the trial's record, and can end the run on all processes at once.

    Attributes:
        value: the value of the last evaluation; NaN before the first.
        rows: number of rows trained on at the last evaluation.
    """

    logs = False
    saves_model = False
    endings = (PrunedError, DivergedError, ReassignedError)

    def __init__(
        self,
        processes: TrialProcesses,
        record: TrialRecord,
        stop_signals: StopSignals,
        criterion: Criterion,
        *,
        batch_sizes: Sequence[int],
        n_reports: int,
        title: str,
        is_first: bool,
    ) -> None:
        """Create the callback of one run.

        Args:
            processes: the processes that run the trial.
            record: receives the reports. On the main process it decides whether to continue.
            stop_signals: signals that stop the whole search.
            criterion: decides which value of an evaluation is reported.
            batch_sizes: effective batch sizes of all candidates, which decide the milestones.
            n_reports: number of evaluations in the trial.
            title: title of the progress bar.
            is_first: whether to print the notes on data and loss, which are the same in all trials.
        """
        self._processes, self._record, self._stop_signals = processes, record, stop_signals
        self._batch_sizes, self._n_reports, self._title = batch_sizes, n_reports, title
        self._criterion, self._is_first = criterion, is_first
        self._steps: dict[int, int] = {}
        self._reached = 0  # the last milestone
        self.value, self.rows = math.nan, 0

    def console(self, is_main: bool, progress: bool) -> Console:
        return _TrialConsole(is_main, progress, title=self._title, is_first=self._is_first)

    def evaluation_rows(self, plan: BasePlan) -> Iterable[int]:
        if not self._steps:
            assert isinstance(plan, Plan), "a search refuses streams"
            # If the remainder of an epoch is carried, updates do not end with the epoch. Treat all epochs as one.
            epochs = (plan.n_epochs * plan.n_rows, 1) if plan.remainder == "carry" else (plan.n_rows, plan.n_epochs)
            self._steps = milestones(*epochs, self._batch_sizes, self._n_reports)
            self._processes.orders.run_on_main(lambda: self._record.set_milestones(self._steps))
        return self._steps

    def stop_signals(self, *, saves: bool) -> StopSignals:  # noqa: ARG002
        return self._stop_signals

    @property
    def budget(self) -> int:
        """Number of rows of the whole trial."""
        return max(self._steps, default=0)

    def on_evaluation(self, entry: EvaluationEntry) -> None:
        """Report an evaluation as the last milestone that its update has reached."""
        self.value, self.rows = self._criterion.value(entry), entry.rows
        milestone = max((rows for rows in self._steps if rows <= entry.rows), default=0)
        if milestone > self._reached:  # otherwise, a callback of the user has requested the evaluation
            self._report(milestone, entry)
        if fault := self._describe_fault(entry):
            raise DivergedError(f"at {entry.rows} of {self.budget} rows, with {fault}")

    def _report(self, milestone: int, entry: EvaluationEntry) -> None:
        self._reached, step = milestone, self._steps[milestone]
        value = math.nan if self._describe_fault(entry) else self.value
        order = self._processes.orders.run_on_main(lambda: self._record.report(step, entry.rows, value))
        if order == "leave":
            raise ReassignedError
        if order == "prune" and milestone < self.budget and not math.isnan(value):  # at the end, it would save nothing
            raise PrunedError(f"at {entry.rows} of {self.budget} rows")

    def _describe_fault(self, entry: EvaluationEntry) -> str:
        """Return which value of an evaluation is not finite; empty if all are."""
        if not math.isfinite(entry.val_loss):
            return f"a validation loss of {entry.val_loss}"
        return "" if math.isfinite(self.value) else f"a value of {self.value} for {self._criterion.name}"


@dataclass
class _TrialConsole(Console):
    """A console with one progress bar for the running trial. The first trial also prints notes on data and loss. The
    search prints the outcome."""

    title: str = ""
    is_first: bool = False

    def bar(self, n_windows: int) -> Progress:
        return Progress(n_windows, bar=self.is_main and self.progress, lines=False, title=self.title, position=1)

    def banner(
        self,
        plan: BasePlan,  # noqa: ARG002
        notes: list[str],
        warmup: int,  # noqa: ARG002
        precision: str,  # noqa: ARG002
        device: str,  # noqa: ARG002
        outputs: list[str],  # noqa: ARG002
    ) -> None:
        if self.is_first:
            self._print(*notes)

    def evaluation(self, entry: EvaluationEntry, plan: BasePlan) -> None:
        pass

    def epoch(self, entry: EpochEntry, plan: BasePlan) -> None:
        pass

    def result(self, result: Result) -> None:
        pass


def run_trial(model_factory: Callable[[], Any], arguments: Mapping[str, Any], callback: TrialCallback) -> TrialResult:
    """Run one trial, and free its memory. Call it on all processes.

    Args:
        model_factory: returns a new model.
        arguments: all arguments of `test_fine_tuning` without the model.
        callback: ends the run if the trial is pruned.
    """
    earlier = _trained.copy()
    try:
        result = train_new_model(model_factory, arguments, callback)
        if callback.rows < callback.budget:
            return TrialResult("pruned", f"by a callback, at {callback.rows} of {callback.budget} rows")
        return TrialResult("finished", result=result, value=callback.value)
    except PrunedError as end:
        return TrialResult("pruned", str(end))
    except DivergedError as end:
        return TrialResult("diverged", str(end) if end.update is None else f"at update {end.update}: {end}")
    except ReassignedError:
        return TrialResult("reassigned")
    except OutOfStepError:
        raise
    except Preempted as end:
        raise KeyboardInterrupt(str(end)) from None
    except (SettingsError, DataError) as error:
        error.__cause__ = error.__context__ = None  # their frames keep the model alive, like the error's own
        return TrialResult("failed", str(error), error=error.with_traceback(None))
    except torch.OutOfMemoryError as error:
        return TrialResult("failed", f"ran out of memory: {error}")
    except Exception as error:
        cause = error.__cause__ if isinstance(error, CallbackError) else None
        where = traceback.extract_tb((cause or error).__traceback__)[-1]
        _write_traceback(error, arguments["output_dir"])
        return TrialResult(
            "failed", f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
        )
    finally:
        # Garbage collection is slow. Do it only if the model is part of a reference cycle, or is on an accelerator.
        if torch.accelerator.is_available() or _trained - earlier:
            give_back_memory()


def train_new_model(model_factory: Callable[[], Any], arguments: Mapping[str, Any], callback: Callback) -> Result:
    """Train a new model from the factory in one run. A search trains models in no other way.

    Args:
        model_factory: returns a new model.
        arguments: all arguments of `test_fine_tuning` without the model. `random_seed` seeds the factory as well, so
            that every trial starts from the same weights.
        callback: the callback of the run.

    Raises:
        SettingsError: if the factory returns a model that an earlier trial has trained.
    """
    with preserve_rng(), hidden_modes():
        seed_all(arguments["random_seed"])
        model = model_factory()
    if model in _trained:
        raise SettingsError(
            [
                "`model_factory` returned a model that an earlier trial has trained. It must return a new model each "
                "time, such as `lambda: copy.deepcopy(model)`."
            ]
        )
    _trained.add(model)
    config = RunConfig.from_arguments({**arguments, "model": model})
    result = run_training(replace(config, coupled_beta2=arguments.get(COUPLED)), callback)
    return result.without_model()  # or the models of all trials would stay in memory


def _write_traceback(error: Exception, folder: str | None) -> None:
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "error.txt").write_text("".join(traceback.format_exception(error)))
