"""When a run is saved, and when it stops because it was asked to: between two windows, on all processes alike."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import Preempted
from ..fields import seconds_of
from ..runtime.memory import free_on_host
from ..runtime.process_group import ProcessGroup
from ..runtime.signals import StopSignals
from ..tracking.metrics_logger import MetricsLogger
from .directory import CheckpointDirectory
from .state import TrainState
from .writing import CheckpointWriter

_ROOM = 1.2  # times what a copy takes


class CheckpointManager:
    """Saves a run every so often, at the end of each epoch, and where it is asked to stop."""

    def __init__(
        self,
        state: TrainState,
        process_group: ProcessGroup,
        stop_signals: StopSignals,
        writer: CheckpointWriter | None,
        directory: CheckpointDirectory | None,
        metadata: dict[str, Any],
        metrics_logger: MetricsLogger,
        *,
        every: int | str | None,
        at_epochs: bool,
        is_sound: Callable[[], bool],
        tell: Callable[[str], None],
        endings: tuple[type[Exception], ...],
    ) -> None:
        """Args:
        writer: on the main process.
        shelf: None where nothing is kept.
        facts: what a checkpoint says of the run, beside its state.
        recorder: knows how far the run is.
        every: updates, or a time.
        at_epochs: whether also at the end of each epoch.
        is_sound: whether the weights can be gone on with, on all processes alike; what is not is not saved.
        tell: shows a sentence to the user.
        endings: errors that end a run for good, so that nobody will go on with it.
        """
        self._state, self._process_group, self._stop_signals = state, process_group, stop_signals
        self._writer, self._directory, self._metadata, self._recorder = writer, directory, metadata, metrics_logger
        self._every, self._at_epochs, self._is_sound, self._tell, self._endings = (
            every,
            at_epochs,
            is_sound,
            tell,
            endings,
        )
        self._saved, self._saved_at = metrics_logger.n_windows, time.monotonic()

    def after_update(self) -> None:
        """Saves where it is time to, and stops where any process was asked to.

        Raises:
            Preempted, KeyboardInterrupt: on all processes, once everything is saved.
        """
        stop, by_hand, due = self._process_group.any_of([*self._asked(), self._is_due()])
        if stop or due:
            self.save()
        if stop:
            raise self._ending(by_hand)

    def after_epoch(self) -> None:
        """Saves an epoch that has been evaluated, and stops where any process was asked to."""
        stop, by_hand = self._process_group.any_of(self._asked())
        if stop or self._at_epochs:
            self.save(self._recorder.n_epochs)
        if stop:
            raise self._ending(by_hand)

    def save(self, n_epochs: int | None = None) -> None:
        """Begins to write a checkpoint, where any are kept. All processes call it alike."""
        if self._directory is None or not self._is_sound():
            return
        self._recorder.drain()
        self._saved, self._saved_at = self._recorder.n_windows, time.monotonic()
        self.close()  # of the copies of two checkpoints, one would be too many
        fits = self._state.n_bytes * _ROOM < free_on_host()
        snapshot = self._state.taken(self._metadata, apart=fits)
        if self._writer is not None and snapshot is not None:
            self._writer.write(snapshot, self._directory.place(self._recorder.n_windows, n_epochs), self._best_epoch())
            if not fits:
                self._writer.finish()

    @contextmanager
    def saved_on(self, errors: tuple[type[Exception], ...], is_whole: Callable[[], bool]) -> Iterator[None]:
        """Sees to it that an error that all processes raise alike costs no update.

        Args:
            is_whole: whether the last update was taken to its end, or not begun.
        """
        try:
            yield
        except self._endings:
            raise
        except errors:
            self._recorder.drain()
            if is_whole():
                self.save()
            raise

    def close(self) -> None:
        """Waits for what is being written."""
        if self._writer is not None:
            self._writer.finish()

    def describe(self) -> str:
        """What is kept of the run, for the last words of it."""
        self.close()
        if self._writer is None or self._writer.last is None:
            return "No checkpoint was kept." if self._directory is None else ""
        return f"{self._writer.last} is the newest checkpoint: the same call with `resume='auto'` goes on from it."

    def _asked(self) -> list[bool]:
        """Whether this process was asked to stop, and whether by hand."""
        return [self._stop_signals.asked is not None, self._stop_signals.asked == signal.SIGINT]

    def _is_due(self) -> bool:
        if self._directory is None:
            return False
        if isinstance(self._every, int):
            return self._recorder.n_windows // self._every > self._saved // self._every
        # One clock decides: the main process's.
        seconds = None if self._every is None or self._writer is None else seconds_of(self._every)
        return seconds is not None and time.monotonic() - self._saved_at >= seconds

    def _best_epoch(self) -> int | None:
        losses = [(e.val_loss, e.epoch + 1) for e in self._state.ledger.epochs if e.val_loss is not None]
        _, best = min(((loss, epoch) for loss, epoch in losses if loss == loss), default=(None, None))
        return best

    def _ending(self, by_hand: bool) -> BaseException:
        self.close()
        self._process_group.any(
            False
        )  # a launcher kills the others when the first one ends, and the main one may be writing
        sentence = f"Stopped after update {self._recorder.n_windows}, as asked. {self.describe()}"
        self._tell(sentence)
        return KeyboardInterrupt(sentence) if by_hand else Preempted(sentence)
