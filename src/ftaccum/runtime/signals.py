"""Signals that ask a run to stop, kept until it can stop cleanly."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from .progress_bar import tqdm

# Ctrl-C; the signal that schedulers send before a kill; the one that SLURM can send earlier (`--signal=USR1@120`).
ASKING = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
_TWICE = 1.0  # seconds: a launcher repeats the signal that the terminal has already sent to all processes


class StopSignals:
    """The first signal that asks to stop, kept until the caller acts on it.

    A later Ctrl-C raises KeyboardInterrupt at once. Other later signals have no effect, because schedulers warn more
    than once.

    Attributes:
        asked: the number of the first signal, or None if none has arrived.
    """

    def __init__(self, sentence: str, numbers: tuple[int, ...] = ASKING) -> None:
        """Create a handler that keeps signals until they are asked for.

        Args:
            sentence: text to print when the first signal arrives.
            numbers: the signals to keep.
        """
        self.asked: int | None = None
        self._sentence, self._numbers = sentence, numbers
        self._since = 0.0
        self._is_kept = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep signals until exit. Signals that the process ignores (`nohup`) stay ignored."""
        in_main = threading.current_thread() is threading.main_thread()  # Python handles signals only there
        if self._is_kept or not in_main:
            yield
            return
        handled = [number for number in self._numbers if signal.getsignal(number) != signal.SIG_IGN]
        before: dict[int, Callable[..., Any] | int | None] = {n: signal.signal(n, self._keep) for n in handled}
        self._is_kept = True
        try:
            yield
        finally:
            self._is_kept = False
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has arrived."""
        if self.asked is not None:
            raise KeyboardInterrupt

    def _keep(self, number: int, _: Any) -> None:
        if self.asked is None:
            self.asked, self._since = number, time.monotonic()
            # Not the logger: the interrupted code may hold its lock. The terminal may be gone, or a write in progress.
            with suppress(OSError, RuntimeError, ValueError):
                tqdm.write(self._sentence, file=sys.stderr)
        elif number == signal.SIGINT and time.monotonic() - self._since > _TWICE:
            raise KeyboardInterrupt
