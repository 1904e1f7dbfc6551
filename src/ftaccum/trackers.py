"""Trackers kept apart from training: they may raise and they may hang, and the run goes on as if they had not."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from .errors import OutputWarning, warn_user

# What a slow tracker may be behind by: hours of updates, in some MB.
_MOST_WAITING = 10_000
_ERRORS_IN_A_ROW = 5
_SECONDS_AT_THE_END = 30.0
# MLflow's current run is that of a thread: what another one logs would begin a second run.
_BOUND_TO_A_THREAD = ("mlflow",)
# Some trackers exit where they are not logged in.
_ERRORS = (Exception, SystemExit)


@contextmanager
def kept_apart(accelerator: Accelerator, config: Mapping[str, Any]) -> Iterator[None]:
    """Starts the trackers that an Accelerator is to log with, on the main process, and finishes them whatever happens.

    Inside, the Accelerator's `log` neither raises nor waits for any of them.

    Args:
        config: the settings that each is told first.

    Warns:
        OutputWarning: where a tracker raised, hung, or was dropped.
    """
    asked, accelerator.trackers = accelerator.log_with, []
    started: list[_Apart] = []
    try:
        for one in asked if accelerator.is_main_process else []:
            name = one.name if isinstance(one, GeneralTracker) else str(one)
            try:
                started.append(_Apart(name, partial(_started, accelerator, one)))
            except _ERRORS as error:
                sentence = f"The tracker {name!r} could not be started, and the run does without it: {_as_text(error)}"
                warn_user(sentence, OutputWarning)
        for tracker in started:
            tracker.store_init_configuration(dict(config))
        accelerator.trackers = started
        yield
    finally:
        accelerator.trackers = []
        _end(started)


def _started(accelerator: Accelerator, asked: Any) -> GeneralTracker:
    """What Accelerate makes of a tracker's name, or of a tracker, when it has no other."""
    accelerator.log_with, accelerator.trackers = [asked], []
    accelerator.init_trackers("ftaccum")
    return accelerator.trackers[0]


def _end(trackers: list["_Apart"]) -> None:
    for tracker in trackers:
        tracker.finish()
    deadline = time.monotonic() + _SECONDS_AT_THE_END
    for tracker in trackers:
        tracker.join(deadline)
    for tracker in trackers:
        tracker.tell()


class _Apart(GeneralTracker):
    """Stands in for a tracker: takes what it is told, and hands it on in order from a thread of its own, so that
    trackers do not wait for each other either. What goes wrong there is told in the caller's thread, at the next call.
    """

    def __init__(self, name: str, start: Callable[[], GeneralTracker]) -> None:
        """Starts the tracker, and raises what it raises."""
        super().__init__(_blank=True)
        self.name = name
        self._change = threading.Condition()
        # Under `_change`:
        self._waiting: deque[tuple[str, tuple[Any, ...], dict[str, Any]]] = deque(maxlen=_MOST_WAITING)
        self._in_work: str | None = None
        self._ended = self._left_behind = False
        self._faults: dict[str, str] = {}  # by what was done, so that each is told once
        self._told: set[str] = set()

        self._tracker: Future[GeneralTracker] = Future()
        if name not in _BOUND_TO_A_THREAD:
            self._tracker.set_result(start())
        self._thread = threading.Thread(target=self._work, args=[start], name=f"tracker {name}", daemon=True)
        self._thread.start()
        self._tracker.result()

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._put("store_init_configuration", values)

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        self._put("log", dict(values), step=step, **options)
        self.tell()

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
                lost = len(self._waiting) + (self._in_work != "finish")
                self._faults["end"] = (
                    f"The tracker {self.name!r} was waited for until {_SECONDS_AT_THE_END:g} s after the end of the "
                    f"run, and is still in `{self._in_work}`. It is left behind: {lost} entries are lost, and it is "
                    "not finished."
                )
                self._waiting.clear()
                self._left_behind = True

    def tell(self) -> None:
        """Warns of what has gone wrong by now, of each thing once."""
        with self._change:
            new = [sentence for what, sentence in self._faults.items() if what not in self._told]
            self._told |= self._faults.keys()
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
        if not self._tracker.done():
            try:
                self._tracker.set_result(start())
            except BaseException as error:
                self._tracker.set_exception(error)
                return
        errors = 0
        while errors < _ERRORS_IN_A_ROW and (entry := self._next()) is not None:
            errors = 0 if self._handed_on(*entry) else errors + 1
        with self._change:
            if errors == _ERRORS_IN_A_ROW:
                self._ended = True
                self._faults["dropped"] = (
                    f"The tracker {self.name!r} raised {errors} times in a row. The run goes on without it."
                )
                self._waiting.clear()
            if self._left_behind:
                return
        self._handed_on("finish", (), {})

    def _next(self) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._ended)
            return self._waiting.popleft() if self._waiting else None

    def _handed_on(self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
        """Whether the tracker took it."""
        with self._change:
            self._in_work = name
        try:
            getattr(self._tracker.result(), name)(*arguments, **options)
        except _ERRORS as error:
            with self._change:
                self._faults.setdefault(name, f"The tracker {self.name!r} raised in `{name}`: {_as_text(error)}")
            return False
        else:
            return True
        finally:
            with self._change:
                self._in_work = None


def _as_text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
