"""Trackers kept apart from training: they may raise and they may hang, and the run goes on as if they had not."""

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from ..errors import OutputWarning, warn_user

T = TypeVar("T")

# What a slow tracker may be behind by: hours of updates, in some MB.
_MOST_WAITING = 10_000
_ERRORS_IN_A_ROW = 5
_SECONDS_AT_THE_START = 60.0
_SECONDS_AT_THE_END = 30.0
# Some trackers exit where they are not logged in.
_ERRORS = (Exception, SystemExit)


@contextmanager
def run_trackers(accelerator: Accelerator, config: Mapping[str, Any]) -> Iterator[None]:
    """Starts the trackers that an Accelerator is to log with, on the main process, and finishes them whatever happens.

    Inside, the Accelerator's `log` neither raises nor waits for any of them.

    Args:
        config: the settings that each is told first.

    Warns:
        OutputWarning: where a tracker raised, hung, or was dropped.
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


def _name_of(asked: Any) -> str:
    return asked.name if isinstance(asked, GeneralTracker) else str(asked)


def _started(accelerator: Accelerator, asked: Any) -> GeneralTracker:
    """What Accelerate makes of a tracker's name, or of a tracker, when it has no other."""
    # Several are started at once, each by an Accelerator that is this one but for its trackers.
    alone = copy.copy(accelerator)
    alone.log_with, alone.trackers = [asked], []
    alone.init_trackers("ftaccum")
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
    """Stands in for a tracker: starts it, takes what it is told, and hands that on in order from a thread of its own,
    so that trackers do not wait for each other either. What goes wrong there is told in the caller's thread, at the
    next call.
    """

    def __init__(self, name: str, start: Callable[[], GeneralTracker]) -> None:
        super().__init__(_blank=True)
        self.name = name
        self._change = threading.Condition()
        # Under `_change`:
        self._waiting: deque[tuple[str, tuple[Any, ...], dict[str, Any]]] = deque(maxlen=_MOST_WAITING)
        self._in_work: str | None = "start"
        self._ended = self._left_behind = False
        self._faults: dict[str, str] = {}  # by what was done, so that each is told once
        self._warned: set[str] = set()

        self._thread = threading.Thread(target=self._work, args=[start], name=f"tracker {name}", daemon=True)
        self._thread.start()

    def wait_for_start(self, deadline: float) -> None:
        """Waits until the tracker is started, or could not be, and says what is to be said of it.

        Args:
            deadline: by the monotonic clock.
        """
        with self._change:
            if not self._change.wait_for(lambda: self._in_work != "start", max(0.0, deadline - time.monotonic())):
                self._faults["slow start"] = (
                    f"The tracker {self.name!r} has not started within {_SECONDS_AT_THE_START:g} s, and the run goes "
                    "on. What it is told waits until it has."
                )
        self.warn()

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._put("store_init_configuration", values)

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        self._put("log", dict(values), step=step, **options)
        self.warn()

    def finish(self) -> None:
        """Has the tracker finished once it has been told all that waits. Returns at once."""
        with self._change:
            self._ended = True
            self._change.notify()

    def join(self, deadline: float) -> None:
        """Waits for the end of what `finish` began, and leaves the tracker behind where it does not come.

        Args:
            deadline: by the monotonic clock.
        """
        self._thread.join(max(0.0, deadline - time.monotonic()))
        with self._change:
            if self._thread.is_alive() and (self._in_work or self._waiting):
                lost = len(self._waiting) + (self._in_work not in ("start", "finish"))
                self._faults["end"] = (
                    f"The tracker {self.name!r} was waited for until {_SECONDS_AT_THE_END:g} s after the end of the "
                    f"run, and is still in `{self._in_work}`. It is left behind: {lost} entries are lost, and it is "
                    "not finished."
                )
                self._waiting.clear()
                self._left_behind = True

    def warn(self) -> None:
        """Warns of what has gone wrong by now, of each thing once."""
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
                    f"The tracker {self.name!r} is {_MOST_WAITING} entries behind. From now on it loses the oldest."
                )
            self._waiting.append((name, arguments, options))
            self._change.notify()

    def _work(self, start: Callable[[], GeneralTracker]) -> None:
        tracker = self._attempt("start", start, "could not be started, and the run does without it")
        if tracker is None:
            return
        errors = 0
        while errors < _ERRORS_IN_A_ROW and (entry := self._next()) is not None:
            errors = 0 if self._hand_on(tracker, *entry) else errors + 1
        if errors == _ERRORS_IN_A_ROW:
            self._end(f"The tracker {self.name!r} raised {errors} times in a row. The run goes on without it.")
        if not self._left_behind:
            self._hand_on(tracker, "finish", (), {})

    def _next(self) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._ended)
            return self._waiting.popleft() if self._waiting else None

    def _hand_on(self, tracker: GeneralTracker, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
        """Return whether the tracker took the call."""
        done = self._attempt(name, lambda: (getattr(tracker, name)(*arguments, **options),), f"raised in `{name}`")
        return done is not None

    def _attempt(self, what: str, call: Callable[[], T], failed: str) -> T | None:
        """Return what `call` returns; None where it raises, which is kept to warn of. A tracker that does not start is
        given no more calls."""
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
        """Take no more calls, and drop those that wait."""
        with self._change:
            self._ended = True
            self._waiting.clear()
            if fault is not None:
                self._faults["dropped"] = fault
