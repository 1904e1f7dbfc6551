"""Who looks on while a run goes on, and may end it: nobody, or a search."""

from collections.abc import Callable, Iterable

from .history import EpochEntry, Work
from .planning import Course, Plan
from .screen import Screen


class Watcher:
    """Looks on at one run. This one wants nothing; a search brings its own."""

    saves_model = True

    def screen(self, is_main: bool, progress: bool) -> Screen:
        """What the run shows itself on."""
        return Screen(is_main, progress)

    def milestones(self, plan: Plan) -> Iterable[int]:  # noqa: ARG002
        """The numbers of rows trained on after which the validation loss is wanted, in ascending order."""
        return ()

    def updated(self) -> None:
        """After each update. What it raises ends the run."""

    def reached(self, milestone: int, rows: int, val_loss: float) -> None:
        """Takes the validation loss at a milestone, on all processes alike. What it raises ends the run.

        Args:
            rows: trained on by now: those of the first update that reached the milestone.
        """


class Milestones:
    """Evaluates where a watcher wants to know the validation loss, at the first update that gets there.

    Evaluating draws nothing and moves nothing, so that a run is the same with and without.
    """

    def __init__(self, watcher: Watcher, plan: Course, evaluate: Callable[[], float | None], work: Work) -> None:
        """Args:
        work: is being timed meanwhile, and evaluating is none of it.
        """
        self._watcher, self._evaluate, self._work = watcher, evaluate, work
        self._plan = plan if isinstance(plan, Plan) else None  # of a stream, nobody knows where its epochs end
        self._ahead = [] if self._plan is None else list(watcher.milestones(self._plan))
        self._windows = 0

    def window_done(self) -> None:
        """After each update. An epoch's end is evaluated anyway, and told by `epoch_done`."""
        self._windows += 1
        self._watcher.updated()
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

    def _tell(self, rows: int, val_loss: float | None) -> None:
        due = [milestone for milestone in self._ahead if milestone <= rows]
        if due and val_loss is not None:
            self._ahead = self._ahead[len(due) :]
            self._watcher.reached(due[-1], rows, val_loss)
