"""The `ftaccum` logger, for everything that a run reports besides its results."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .progress_bar import tqdm

logger = logging.getLogger("ftaccum")


class _StderrHandler(logging.Handler):
    """A handler that writes to standard error without breaking tqdm's progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except (OSError, RuntimeError, ValueError):  # the terminal is gone, or a signal interrupted a write
            self.handleError(record)


@contextmanager
def run_logging(*, enabled: bool, verbosity: str = "normal") -> Iterator[None]:
    """Set up the logger for the duration of a run.

    Messages go to the handlers that the application has configured, or to standard error if there are none.

    Args:
        enabled: False drops all messages, for processes other than the main one and for the trials of a search.
        verbosity: "quiet" drops messages below warnings. "normal" and "debug" log from INFO and DEBUG on, unless the
            application has set a level for the logger.
    """
    level, disabled = logger.level, logger.disabled
    handler = _StderrHandler() if enabled and not logger.hasHandlers() else None
    if handler is not None:
        logger.addHandler(handler)
    if verbosity == "quiet":
        logger.setLevel(max(level, logging.WARNING))
    elif level == logging.NOTSET:  # the application's handlers still filter by their own levels
        logger.setLevel(logging.DEBUG if verbosity == "debug" else logging.INFO)
    logger.disabled = disabled or not enabled
    try:
        yield
    finally:
        logger.setLevel(level)  # unlike an assignment, this clears the logger's cache
        logger.disabled = disabled
        if handler is not None:
            logger.removeHandler(handler)
