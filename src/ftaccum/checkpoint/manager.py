"""Save a run, and stop it on request. Both happen between two windows, on all processes together."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import Preempted
from ..rules.periods import seconds_of
from ..runtime.log import logger
from ..runtime.process_group import ProcessGroup
from ..runtime.signals import StopSignals
from ..tracking.selection import Criterion
from .compatibility import RunIdentity
from .directory import CheckpointDirectory
from .sharded_writer import ShardedWriter
from .state import TrainState
from .writer import CheckpointWriter


@dataclass(frozen=True)
class SavePolicy:
    """The policy of when to save and which checkpoints to keep.

    Attributes:
        every: updates between two checkpoints, or a time such as "15min"; None for none within an epoch.
        at_evaluations: whether to save at the end of each epoch, and after each evaluation that is the best so far.
        keep: number of newest checkpoints to keep.
        criterion: decides which evaluation is the best one, whose checkpoint is always kept.
        endings: errors after which a run will not be resumed, so that nothing is saved.
    """

    every: int | str | None
    at_evaluations: bool
    keep: int
    criterion: Criterion
    endings: tuple[type[Exception], ...] = ()


class Interrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C, and has completed its update before."""


class CheckpointManager:
    """The manager that saves a run: at intervals, at the ends of epochs, after the best evaluation, and on request."""

    def __init__(
        self,
        state: TrainState,
        identity: RunIdentity,
        directory: CheckpointDirectory | None,
        policy: SavePolicy,
        process_group: ProcessGroup,
        stop_signals: StopSignals,
        *,
        is_healthy: Callable[[], bool],
        resumed_from: Path | None,
    ) -> None:
        """Create a manager.

        Args:
            directory: where to save; None saves nothing.
            is_healthy: returns whether training can continue from the weights, the same on all processes. If not,
                nothing is saved.
            resumed_from: the checkpoint that the run resumed from, if any.
        """
        self._state, self._identity, self._directory, self._policy = state, identity, directory, policy
        self._process_group, self._stop_signals, self._is_healthy = process_group, stop_signals, is_healthy
        self._writer = None if directory is None else self._new_writer(directory, resumed_from)
        self._saved, self._saved_at = self._n_updates, time.monotonic()

    def after_update(self, *, improved: bool = False, requested: bool = False) -> bool:
        """Save if a checkpoint is due, and stop if any process was asked to. Return whether the run was saved.

        Args:
            improved: whether the run was evaluated after this update, with the best value so far.
            requested: whether a callback requests a checkpoint.

        Raises:
            Preempted, KeyboardInterrupt: on all processes, once the run is saved.
        """
        due = self._is_due() or requested or (improved and self._policy.at_evaluations)
        writing = [] if self._writer is None else self._writer.status()
        stop, by_hand, due, *writing = self._process_group.any_of([*self._stop_requests(), due, *writing])
        if self._writer is not None:
            self._writer.advance(busy=writing[0], failed=writing[1])
        saved = self.save() if stop or due else False
        if stop:
            raise self._stopped(by_hand)
        return saved

    def after_epoch(self, *, requested: bool) -> bool:
        """Save after an epoch has ended and was evaluated, and stop if any process was asked to.

        Return whether the run was saved.

        Args:
            requested: whether a callback requests a checkpoint.
        """
        stop, by_hand = self._process_group.any_of(self._stop_requests())
        wanted = stop or requested or self._policy.at_evaluations
        saved = self.save(self._state.metrics_logger.n_epochs) if wanted else False
        if stop:
            raise self._stopped(by_hand)
        return saved

    def save(self, n_epochs: int | None = None) -> bool:
        """Begin to write a checkpoint, and return whether the run saves any. All processes must call this together.

        Args:
            n_epochs: number of epochs so far, if the last update ended one.
        """
        if self._directory is None or self._writer is None or not self._is_healthy():
            return False
        self._state.metrics_logger.drain()
        self._saved, self._saved_at = self._n_updates, time.monotonic()
        self._writer.finish()  # two copies at once could exceed the memory
        fits = self._writer.has_room(self._state.n_bytes)
        snapshot = self._state.snapshot(self._identity.as_metadata(), copy=fits)
        if snapshot is not None:
            best = self._policy.criterion.best(self._state.metrics_logger.ledger.evaluations)
            place = self._directory.place(self._saved, n_epochs)
            self._writer.write(snapshot, place, None if best is None else best.evaluation)
            if not fits:
                self._writer.release()
        return True

    @contextmanager
    def saved_on(self, errors: tuple[type[Exception], ...], is_whole: Callable[[], bool]) -> Iterator[None]:
        """Save the run if an error ends it that all processes raise together.

        Args:
            errors: these errors.
            is_whole: returns whether the last update was completed or not begun.
        """
        try:
            yield
        except self._policy.endings:
            raise
        except errors:
            self._state.metrics_logger.drain()
            if is_whole():
                self.save()
                self.finish_writing()
            raise

    def close(self) -> None:
        """Wait until the current checkpoint is written, if the other processes may be gone."""
        if self._writer is not None:
            self._writer.close()

    def finish(self, *, keeps: bool) -> None:
        """Remove the checkpoints of a run that has finished, and log which one stays. The main process removes them.

        Args:
            keeps: whether to keep the newest, so that the run can be extended.
        """
        self.finish_writing()
        if self._writer is not None and self._process_group.is_main:
            self._writer.keep_last(keeps=keeps)

    def describe(self) -> str:
        """Return a sentence on the newest checkpoint, for the run's last message."""
        self.close()
        if self._writer is not None and not self._process_group.is_main:
            return ""
        if self._writer is None or self._writer.last is None:
            return "No checkpoint was kept."
        remedy = "To resume, make the same call with `resume='auto'` (`--resume auto`)."
        return f"The newest checkpoint is {self._writer.last}. {remedy}"

    @property
    def _n_updates(self) -> int:
        return self._state.metrics_logger.n_windows

    def _stop_requests(self) -> list[bool]:
        """Return whether this process was asked to stop, and whether that was by Ctrl-C."""
        return [self._stop_signals.asked is not None, self._stop_signals.asked == signal.SIGINT]

    def _is_due(self) -> bool:
        every = self._policy.every
        if self._directory is None:
            return False
        if isinstance(every, int):
            return self._n_updates // every > self._saved // every
        # Only the main process's clock decides.
        seconds = None if every is None or not self._process_group.is_main else seconds_of(every)
        return seconds is not None and time.monotonic() - self._saved_at >= seconds

    def _new_writer(self, directory: CheckpointDirectory, last: Path | None) -> CheckpointWriter:
        if self._state.is_sharded:
            return ShardedWriter(directory, self._policy.keep, last, self._process_group)
        return CheckpointWriter(directory, self._policy.keep, last)

    def finish_writing(self) -> None:
        """Wait until the current checkpoint is written. All processes must call this together."""
        if self._writer is not None:
            self._writer.finish()

    def _stopped(self, by_hand: bool) -> BaseException:
        self.finish_writing()
        # A launcher kills all processes when the first one ends, while the main process may still write.
        self._process_group.any(False)
        message = f"Stopped after update {self._n_updates}, as requested. {self.describe()}"
        logger.warning(message)
        return Interrupted(message) if by_hand else Preempted(message)
