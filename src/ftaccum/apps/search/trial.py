"""One trial: a run of `test_fine_tuning` that reports at its milestones, and what became of it."""

import math
import traceback
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...errors import DataError, DivergedError, Preempted, SettingsError
from ...fine_tuning import fine_tuned
from ...planning.course import BasePlan
from ...planning.plan import Plan
from ...runtime.memory import give_back_memory
from ...runtime.signals import StopSignals
from ...runtime.state_guards import preserve_rng, seed_all
from ...tracking.console import Console
from ...tracking.ledger import EpochEntry
from ...tracking.result import Result
from ...training.callbacks import Callback
from .book import TrialRecord
from .processes import OutOfStepError, TrialProcesses
from .report_steps import milestones

_trained: weakref.WeakSet[Any] = weakref.WeakSet()  # models of trials, as long as somebody else keeps them


class PrunedError(Exception):
    """Ends a run whose trial is not worth going on with."""


class TakenError(Exception):
    """Ends a run whose trial is somebody else's by now."""


@dataclass(frozen=True)
class TrialResult:
    """What became of a trial, on this process.

    Attributes:
        kind: "finished", "pruned", "diverged", "left" or "failed".
        reason: of all but the first, in a sentence.
        result: of the first.
        error: of a failure, where it is the user's to mend and would befall every trial.
    """

    kind: str
    reason: str = ""
    result: Result | None = None
    error: SettingsError | DataError | None = None


def run_trial(
    model_factory: Callable[[], Any],
    arguments: Mapping[str, Any],
    callback: Callback,
) -> TrialResult:
    """Runs one trial, and frees what it held. All processes call it alike.

    Args:
        arguments: all of `test_fine_tuning`'s but the model. Its `random_seed` also seeds the factory, so that every
            trial starts from the same weights.
    """
    model = kept = None
    try:
        model = seeded_model(model_factory, arguments["random_seed"])
        kept = weakref.ref(model)
        return TrialResult("finished", result=fine_tuned({**arguments, "model": model}, callback))
    except PrunedError as end:
        return TrialResult("pruned", str(end))
    except DivergedError as end:
        return TrialResult("diverged", str(end) if end.update is None else f"at update {end.update}: {end}")
    except TakenError:
        return TrialResult("left")
    except OutOfStepError:
        raise
    except Preempted as end:
        raise KeyboardInterrupt(str(end)) from None
    except (SettingsError, DataError) as error:
        error.__cause__ = error.__context__ = None  # their frames hold the model, as the error's own do
        return TrialResult("failed", str(error), error=error.with_traceback(None))
    except torch.OutOfMemoryError as error:
        return TrialResult("failed", f"ran out of memory: {error}")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        _keep_traceback(error, arguments["output_dir"])
        return TrialResult(
            "failed", f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
        )
    finally:
        model = None
        # Where the model is in a circle with something, to look for it takes its time. A GPU may be shared with others.
        if torch.accelerator.is_available() or (kept is not None and kept() is not None):
            give_back_memory()


def _keep_traceback(error: Exception, folder: str | None) -> None:
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "error.txt").write_text("".join(traceback.format_exception(error)))


def seeded_model(model_factory: Callable[[], Any], seed: int) -> Any:
    """A model whose fresh weights are the same each time.

    Raises:
        SettingsError: where it is one that was trained before.
    """
    with preserve_rng():
        seed_all(seed)
        model = model_factory()
    if model in _trained:
        raise SettingsError(
            [
                "`model_factory` returned a model that an earlier trial has trained. Have it make a new one each time, "
                "such as `lambda: copy.deepcopy(model)`."
            ]
        )
    _trained.add(model)
    return model


class TrialCallback(Callback):
    """Reports a run's milestones to the book, and ends it where the book says so: on all processes at once."""

    saves_model = False
    endings = (PrunedError, DivergedError, TakenError)

    def __init__(
        self,
        processes: TrialProcesses,
        record: TrialRecord,
        stop_signals: StopSignals,
        *,
        batch_sizes: Sequence[int],
        n_reports: int,
        title: str,
    ) -> None:
        """Args:
        batch_sizes: effective batches of all candidates, to meet where each of them ends an update.
        n_reports: evaluations over the trial.
        title: of the progress bar.
        """
        self._processes, self._record, self._stop_signals = processes, record, stop_signals
        self._batch_sizes, self._n_reports, self._title = batch_sizes, n_reports, title
        self._steps: dict[int, int] = {}

    def console(self, is_main: bool, progress: bool) -> Console:
        return _TrialConsole(is_main, progress, title=self._title)

    def milestones(self, plan: Plan) -> Iterable[int]:
        # Where what is left of an epoch is carried, its end is none of an update's: all epochs are as one.
        epochs = (plan.n_epochs * plan.n_rows, 1) if plan.remainder == "carry" else (plan.n_rows, plan.n_epochs)
        self._steps = milestones(*epochs, self._batch_sizes, self._n_reports)
        self._processes.orders.run_on_main(lambda: self._record.begin(self._steps))
        return self._steps

    def stop_signals(self, *, saves: bool) -> StopSignals:  # noqa: ARG002
        return self._stop_signals

    def reached(self, milestone: int, rows: int, val_loss: float) -> None:
        step, budget = self._steps[milestone], max(self._steps)
        order = self._processes.orders.run_on_main(lambda: self._record.report(step, rows, val_loss))
        if order == "leave":
            raise TakenError
        if not math.isfinite(val_loss):
            raise DivergedError(f"at {rows} of {budget} rows, with a validation loss of {val_loss}")
        if order == "prune" and milestone < budget:  # at the end there is nothing left to save
            raise PrunedError(f"at {rows} of {budget} rows")


@dataclass
class _TrialConsole(Console):
    """One bar for the running trial, and nothing else: what it comes to is a line of the search's own."""

    title: str = ""

    def bar(self, n_windows: int) -> tqdm:
        hidden = not (self.is_main and self.progress)
        return tqdm(total=n_windows, desc=self.title, disable=hidden, leave=False, position=1)

    def banner(self, plan: BasePlan, notes: list[str], warmup: int, precision: str, device: str) -> None:
        pass

    def epoch(self, entry: EpochEntry, n_epochs: int) -> None:
        pass

    def note(self, sentence: str) -> None:
        pass

    def result(self, result: Result) -> None:
        pass
