"""The `ftaccum` logger: what happens in a run besides its results."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

logger = logging.getLogger("ftaccum")


class _StderrHandler(logging.Handler):
    """Writes to standard error around tqdm's progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except (OSError, RuntimeError, ValueError):  # a terminal that is gone, or is being written to by a signal
            self.handleError(record)


@contextmanager
def run_logging(*, enabled: bool) -> Iterator[None]:
    """Set up the logger for the time of a run.

    Messages go to the handlers that the application has configured; where there are none, to standard error.

    Args:
        enabled: False drops all messages: of processes other than the main one, and of the trials of a search.
    """
    level, disabled = logger.level, logger.disabled
    handler = _StderrHandler() if enabled and not logger.hasHandlers() else None
    if handler is not None:
        logger.addHandler(handler)
    if level == logging.NOTSET:  # the application's handlers have levels of their own
        logger.setLevel(logging.INFO)
    logger.disabled = disabled or not enabled
    try:
        yield
    finally:
        logger.setLevel(level)  # an assignment would leave the logger's cache as it is
        logger.disabled = disabled
        if handler is not None:
            logger.removeHandler(handler)
