"""The interface through which a search follows its trials."""

import signal
from collections.abc import Iterable

from ..planning.base_plan import BasePlan
from ..runtime.signals import ASKING, StopSignals
from ..tracking.console import Console
from ..tracking.ledger import EvaluationEntry


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

    def evaluation_rows(self, plan: BasePlan) -> Iterable[int] | None:  # noqa: ARG002
        """Return the numbers of trained rows after which to evaluate the run; None to follow `evaluate_every`."""
        return None

    def on_evaluation(self, entry: EvaluationEntry) -> None:
        """Receive an evaluation after the first update, on every process. An error raised here ends the run.

        A resumed run passes the evaluations before the interruption again.
        """
