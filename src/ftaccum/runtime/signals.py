"""Signals that ask to stop, kept until nothing is half done."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

# Ctrl-C; what schedulers send before they kill; what SLURM can be asked to send some time before (`--signal=USR1@120`).
ASKING = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
_TWICE = 1.0  # seconds: a launcher hands on the signal that the terminal has sent to all


class StopSignals:
    """Keeps the first signal that asks to stop. A Ctrl-C after it raises KeyboardInterrupt at once; other signals say
    again what is known: schedulers warn more than once.

    Attributes:
        asked: the number of the signal that came, or None.
    """

    def __init__(self, sentence: str, numbers: tuple[int, ...] = ASKING) -> None:
        """Args:
        sentence: is told when the first one comes.
        numbers: the signals that are kept.
        """
        self.asked: int | None = None
        self._sentence, self._numbers = sentence, numbers
        self._since = 0.0
        self._is_kept = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """For as long as it takes. A signal that is ignored (`nohup`) stays so."""
        in_main = threading.current_thread() is threading.main_thread()  # in others, Python takes no signals
        if self._is_kept or not in_main:
            yield
            return
        heard = [number for number in self._numbers if signal.getsignal(number) != signal.SIG_IGN]
        before: dict[int, Callable[..., Any] | int | None] = {n: signal.signal(n, self._keep) for n in heard}
        self._is_kept = True
        try:
            yield
        finally:
            self._is_kept = False
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def check(self) -> None:
        """Raises KeyboardInterrupt where a signal is kept."""
        if self.asked is not None:
            raise KeyboardInterrupt

    def _keep(self, number: int, _: Any) -> None:
        if self.asked is None:
            self.asked, self._since = number, time.monotonic()
            # Not the logger, whose lock the interrupted code may hold. The terminal may be gone, or in use right now.
            with suppress(OSError, RuntimeError, ValueError):
                tqdm.write(self._sentence, file=sys.stderr)
        elif number == signal.SIGINT and time.monotonic() - self._since > _TWICE:
            raise KeyboardInterrupt
