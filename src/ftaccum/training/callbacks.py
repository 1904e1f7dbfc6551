"""Callbacks, which follow a run and may end it."""

import signal
from collections.abc import Callable, Iterable
from typing import Any

from ..planning.base_plan import BasePlan
from ..runtime.signals import ASKING, StopSignals
from ..tracking.console import Console
from ..tracking.ledger import EpochEntry
from ..tracking.throughput import Throughput


class Callback:
    """A callback that does nothing. Subclasses follow one run, as the search does.

    Attributes:
        logs: whether the run logs messages.
        saves_model: whether the run saves its model, and a checkpoint at the end of each epoch.
        endings: types of errors that the callback raises to end a run for good.
    """

    logs = True
    saves_model = True
    endings: tuple[type[Exception], ...] = ()

    def console(self, is_main: bool, progress: bool) -> Console:
        """Return the console that the run prints to."""
        return Console(is_main, progress)

    def stop_signals(self, *, saves: bool) -> StopSignals:
        """Return the handler of the signals that ask to stop; it handles only Ctrl-C if the run is not saved."""
        sentence = "Asked to stop: finishing the current update first. Press Ctrl-C (again) to stop at once."
        return StopSignals(sentence, ASKING if saves else (signal.SIGINT,))

    def milestones(self, plan: BasePlan) -> Iterable[int]:  # noqa: ARG002
        """Return the numbers of trained rows after which to evaluate, in ascending order."""
        return ()

    def reached(self, milestone: int, rows: int, val_loss: float) -> None:
        """Receive the validation loss at a milestone, on every process. An error raised here ends the run.

        Args:
            milestone: the number of trained rows to evaluate after.
            rows: the number of rows trained on by now, after the first update that reached the milestone.
            val_loss: the validation loss.
        """


class Milestones:
    """Reports the validation loss to a callback after the first update that reaches each milestone.

    An evaluation draws no random numbers and changes no state, so milestones do not change the run.
    """

    def __init__(
        self, callback: Callback, plan: BasePlan, evaluate: Callable[[], float | None], throughput: Throughput
    ) -> None:
        """Create milestones.

        Args:
            evaluate: returns the validation loss.
            throughput: measures the training time, which does not include evaluations.
        """
        self._callback, self._plan = callback, plan
        self._evaluate, self._throughput = evaluate, throughput
        self._ahead = list(callback.milestones(plan))
        self._windows = 0
        self._reported: list[tuple[int, int, float]] = []

    def window_done(self) -> None:
        """Evaluate if an update has reached a milestone, unless it ends the epoch, which is evaluated anyway."""
        self._windows += 1
        if not self._ahead or self._ahead[0] > self._rows or self._plan.ends_epoch(self._windows):
            return
        with self._throughput.timed(-1):
            val_loss = self._evaluate()
        self._report_due(val_loss)

    def epoch_done(self, entry: EpochEntry) -> None:
        """Report the validation loss of an epoch, if a milestone is due."""
        if self._ahead:
            self._report_due(entry.val_loss)

    def state_dict(self) -> dict[str, Any]:
        return {"windows": self._windows, "reported": self._reported}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Report the restored milestones again, since the callback of this process may not know them."""
        self._windows = state_dict["windows"]
        for milestone, rows, val_loss in state_dict["reported"]:
            self._report(milestone, rows, val_loss)

    @property
    def _rows(self) -> int:
        return self._plan.rows_after(self._windows)

    def _report_due(self, val_loss: float | None) -> None:
        due = [milestone for milestone in self._ahead if milestone <= self._rows]
        if due and val_loss is not None:
            self._report(due[-1], self._rows, val_loss)

    def _report(self, milestone: int, rows: int, val_loss: float) -> None:
        self._ahead = [ahead for ahead in self._ahead if ahead > milestone]
        self._reported.append((milestone, rows, val_loss))
        self._callback.reached(milestone, rows, val_loss)
