"""Ctrl-C and the like, taken where nothing is half done."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

_TWICE = 1.0  # seconds: a launcher hands on the signal that the terminal has sent to all


class Interrupts:
    """Keeps an interrupt until a trial's next update: in the middle of a word with the storage it would leave that
    locked, for all other workers, too. A second one is not kept."""

    def __init__(self) -> None:
        self.asked, self._since = False, 0.0

    @contextmanager
    def kept(self) -> Iterator[None]:
        """For as long as a search runs."""
        if threading.current_thread() is not threading.main_thread():  # there, Python takes no signals
            yield
            return
        before = {number: signal.signal(number, self._keep) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def check(self) -> None:
        """Raises KeyboardInterrupt where one is kept."""
        if self.asked:
            raise KeyboardInterrupt

    def _keep(self, *_: Any) -> None:
        if self.asked:
            if time.monotonic() - self._since > _TWICE:
                raise KeyboardInterrupt
            return
        self.asked, self._since = True, time.monotonic()
        tqdm.write(
            "Interrupted: the running trial ends with its next update, and will run again. Once more stops at once."
        )
