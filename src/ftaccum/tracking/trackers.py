"""Trackers isolated from training: if they raise or hang, the run continues as if they had not."""

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from ..errors import OutputWarning, warn_user
from ..runtime.process_group import ProcessGroup
from ..runtime.run_dir import RunDir
from .local_trackers import PROJECT, local_tracker

T = TypeVar("T")

# Entries that may wait for a slow tracker: hours of updates, in a few MB.
_MOST_WAITING = 10_000
_ERRORS_IN_A_ROW = 5
_SECONDS_AT_THE_START = 60.0
_SECONDS_AT_THE_END = 30.0
# Some trackers exit the process if the user is not logged in.
_ERRORS = (Exception, SystemExit)


@contextmanager
def run_trackers(accelerator: Accelerator, config: Mapping[str, Any]) -> Iterator[None]:
    """Start an Accelerator's trackers on the main process, and finish them whatever happens.

    Inside, the Accelerator's `log` neither raises nor waits for any tracker.

    Args:
        config: the settings to store in each tracker first.

    Warns:
        OutputWarning: if a tracker raised, hung or was dropped.
    """
    asked = accelerator.log_with if accelerator.is_main_process else []
    trackers = [_BackgroundTracker(_name_of(one), partial(_started, accelerator, one)) for one in asked]
    try:
        for tracker in trackers:
            tracker.store_init_configuration(dict(config))
        deadline = time.monotonic() + _SECONDS_AT_THE_START
        for tracker in trackers:
            tracker.wait_for_start(deadline)
        accelerator.trackers = list(trackers)
        yield
    finally:
        accelerator.trackers = []
        _finish_all(trackers)


def set_tracker_folder(
    accelerator: Accelerator, run_dir: RunDir | None, process_group: ProcessGroup, resumed_from: Path | None
) -> None:
    """Set the folder in which an Accelerator's trackers write files. All processes must call this together.

    Each new run in an output folder gets its own, so that curves do not mix. A resumed run continues in the newest.

    Args:
        resumed_from: the checkpoint that the run resumes from, if any.
    """
    if run_dir is None or not accelerator.log_with:
        return
    continues = resumed_from is not None and run_dir.path.resolve() in resumed_from.resolve().parents
    folder = process_group.run_on_main(lambda: run_dir.tracker_folder(continues=continues))
    accelerator.project_configuration.logging_dir = str(folder)


def _name_of(asked: Any) -> str:
    return asked.name if isinstance(asked, GeneralTracker) else str(asked)


def _started(accelerator: Accelerator, asked: Any) -> GeneralTracker:
    """Return the started tracker of a name, or a given one after its start."""
    folder = accelerator.logging_dir
    own = None if isinstance(asked, GeneralTracker) else local_tracker(str(asked), folder and Path(folder))
    # Trackers start in parallel, each with its own copy of the Accelerator that has no other tracker.
    alone = copy.copy(accelerator)
    alone.log_with, alone.trackers = [own or asked], []
    alone.init_trackers(PROJECT)
    return alone.trackers[0]


def _finish_all(trackers: list["_BackgroundTracker"]) -> None:
    for tracker in trackers:
        tracker.finish()
    deadline = time.monotonic() + _SECONDS_AT_THE_END
    for tracker in trackers:
        tracker.join(deadline)
    for tracker in trackers:
        tracker.warn()


class _BackgroundTracker(GeneralTracker):
    """A stand-in for a tracker, which starts it and forwards calls to it, in order, from a thread of its own.

    So trackers do not wait for each other either. The next call warns of errors, in the caller's thread.
    """

    def __init__(self, name: str, start: Callable[[], GeneralTracker]) -> None:
        super().__init__(_blank=True)
        self.name = name
        self._change = threading.Condition()
        # Guarded by `_change`:
        self._waiting: deque[tuple[str, tuple[Any, ...], dict[str, Any]]] = deque(maxlen=_MOST_WAITING)
        self._in_work: str | None = "start"
        self._ended = self._left_behind = False
        self._faults: dict[str, str] = {}  # by failed action, so that each is reported once
        self._warned: set[str] = set()

        self._thread = threading.Thread(target=self._work, args=[start], name=f"tracker {name}", daemon=True)
        self._thread.start()

    def wait_for_start(self, deadline: float) -> None:
        """Wait until the tracker has started or failed to start, and warn of problems.

        Args:
            deadline: latest time, as `time.monotonic()` gives it.
        """
        with self._change:
            if not self._change.wait_for(lambda: self._in_work != "start", max(0.0, deadline - time.monotonic())):
                self._faults["slow start"] = (
                    f"The tracker {self.name!r} has not started within {_SECONDS_AT_THE_START:g} s, and the run "
                    "continues. Entries wait until the tracker has started."
                )
        self.warn()

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._put("store_init_configuration", values)

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        self._put("log", dict(values), step=step, **options)
        self.warn()

    def finish(self) -> None:
        """Make the tracker finish after all waiting entries. Return at once."""
        with self._change:
            self._ended = True
            self._change.notify()

    def join(self, deadline: float) -> None:
        """Wait until the tracker has finished, or abandon it at the deadline.

        Args:
            deadline: latest time, as `time.monotonic()` gives it.
        """
        self._thread.join(max(0.0, deadline - time.monotonic()))
        with self._change:
            if self._thread.is_alive() and (self._in_work or self._waiting):
                lost = len(self._waiting) + (self._in_work not in ("start", "finish"))
                self._faults["end"] = (
                    f"The tracker {self.name!r} is still in `{self._in_work}`, {_SECONDS_AT_THE_END:g} s after the end "
                    f"of the run. The run no longer waits for it: {lost} entries are lost, and the tracker is not "
                    "finished."
                )
                self._waiting.clear()
                self._left_behind = True

    def warn(self) -> None:
        """Warn of each problem so far that has not been reported."""
        with self._change:
            new = [sentence for what, sentence in self._faults.items() if what not in self._warned]
            self._warned |= self._faults.keys()
        for sentence in new:
            warn_user(sentence, OutputWarning)

    def _put(self, name: str, *arguments: Any, **options: Any) -> None:
        with self._change:
            if self._ended:
                return
            if len(self._waiting) == _MOST_WAITING:
                self._faults["waiting"] = (
                    f"The tracker {self.name!r} is {_MOST_WAITING} entries behind. From now on, the oldest are lost."
                )
            self._waiting.append((name, arguments, options))
            self._change.notify()

    def _work(self, start: Callable[[], GeneralTracker]) -> None:
        tracker = self._attempt("start", start, "could not be started, and the run continues without it")
        if tracker is None:
            return
        errors = 0
        while errors < _ERRORS_IN_A_ROW and (entry := self._next()) is not None:
            errors = 0 if self._hand_on(tracker, *entry) else errors + 1
        if errors == _ERRORS_IN_A_ROW:
            self._end(f"The tracker {self.name!r} raised {errors} times in a row. The run continues without it.")
        if not self._left_behind:
            self._hand_on(tracker, "finish", (), {})

    def _next(self) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._ended)
            return self._waiting.popleft() if self._waiting else None

    def _hand_on(self, tracker: GeneralTracker, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
        """Forward a call to the tracker, and return whether it succeeded."""
        done = self._attempt(name, lambda: (getattr(tracker, name)(*arguments, **options),), f"raised in `{name}`")
        return done is not None

    def _attempt(self, what: str, call: Callable[[], T], failed: str) -> T | None:
        """Return the result of `call`, or None if it raises, and keep the error for a warning.

        A tracker that fails to start gets no more calls.
        """
        with self._change:
            self._in_work = what
        try:
            return call()
        except _ERRORS as error:
            fault = f"The tracker {self.name!r} {failed}: {type(error).__name__}: {error}"
            with self._change:
                self._faults.setdefault(what, fault)
            if what == "start":
                self._end()
            return None
        finally:
            with self._change:
                self._in_work = None
                self._change.notify_all()

    def _end(self, fault: str | None = None) -> None:
        """Accept no more calls, and drop those that wait."""
        with self._change:
            self._ended = True
            self._waiting.clear()
            if fault is not None:
                self._faults["dropped"] = fault
