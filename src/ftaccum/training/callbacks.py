"""Who looks on while a run goes on, and may end it: nobody, or a search."""

import signal
from collections.abc import Callable, Iterable
from typing import Any

from ..planning.course import BasePlan
from ..planning.plan import Plan
from ..runtime.signals import ASKING, StopSignals
from ..tracking.console import Console
from ..tracking.ledger import EpochEntry
from ..tracking.throughput import Throughput


class Callback:
    """Looks on at one run. This one wants nothing; a search brings its own."""

    saves_model = True  # and a checkpoint of every epoch
    endings: tuple[type[Exception], ...] = ()  # what it raises to end a run

    def console(self, is_main: bool, progress: bool) -> Console:
        """What the run shows itself on."""
        return Console(is_main, progress)

    def stop_signals(self, *, saves: bool) -> StopSignals:
        """What keeps the signals that ask to stop. Of a run that nothing is saved of, only Ctrl-C is kept."""
        sentence = "Asked to stop: the update under way is finished first. Ctrl-C (again) stops at once."
        return StopSignals(sentence, ASKING if saves else (signal.SIGINT,))

    def milestones(self, plan: Plan) -> Iterable[int]:  # noqa: ARG002
        """The numbers of rows trained on after which the validation loss is wanted, in ascending order."""
        return ()

    def reached(self, milestone: int, rows: int, val_loss: float) -> None:
        """Takes the validation loss at a milestone, on all processes alike. What it raises ends the run.

        Args:
            rows: trained on by now: those of the first update that reached the milestone.
        """


class Milestones:
    """Evaluates where a watcher wants to know the validation loss, at the first update that gets there.

    Evaluating draws nothing and moves nothing, so that a run is the same with and without.
    """

    def __init__(
        self, callback: Callback, plan: BasePlan, evaluate: Callable[[], float | None], work: Throughput
    ) -> None:
        """Args:
        work: is being timed meanwhile, and evaluating is none of it.
        """
        self._callback, self._evaluate, self._work = callback, evaluate, work
        self._plan = plan if isinstance(plan, Plan) else None  # of a stream, nobody knows where its epochs end
        self._ahead = [] if self._plan is None else list(callback.milestones(self._plan))
        self._windows = 0
        self._told: list[tuple[int, int, float]] = []

    def window_done(self) -> None:
        """After each update. An epoch's end is evaluated anyway, and told by `epoch_done`."""
        self._windows += 1
        if self._plan is None:
            return
        rows = self._plan.rows_after(self._windows)
        if self._ahead and self._ahead[0] <= rows and not self._plan.ends_epoch(self._windows):
            with self._work.timed(-1):
                val_loss = self._evaluate()
            self._tell(rows, val_loss)

    def epoch_done(self, entry: EpochEntry) -> None:
        if self._plan is not None:
            self._tell(self._plan.rows_after(self._windows), entry.val_loss)

    def state_dict(self) -> dict[str, Any]:
        return {"windows": self._windows, "told": self._told}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Tells again what was told: whoever looks on now may not have heard it."""
        self._windows = state_dict["windows"]
        for milestone, rows, val_loss in state_dict["told"]:
            self._reached(milestone, rows, val_loss)

    def _tell(self, rows: int, val_loss: float | None) -> None:
        due = [milestone for milestone in self._ahead if milestone <= rows]
        if due and val_loss is not None:
            self._reached(due[-1], rows, val_loss)

    def _reached(self, milestone: int, rows: int, val_loss: float) -> None:
        self._ahead = [ahead for ahead in self._ahead if ahead > milestone]
        self._told.append((milestone, rows, val_loss))
        self._callback.reached(milestone, rows, val_loss)
