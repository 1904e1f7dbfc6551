"""The class of all progress bars, where they are drawn, and how lines appear above them."""

import sys
import warnings
from contextlib import suppress

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # in a notebook without ipywidgets, bars are text
    from tqdm.auto import tqdm

__all__ = ["can_draw_bars", "is_interactive", "print_above_bars", "tqdm"]


def is_interactive() -> bool:
    """Return whether a user types the calls: in a notebook or at a prompt."""
    if hasattr(sys, "ps1"):
        return True
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def can_draw_bars() -> bool:
    """Return whether a bar can be redrawn in place: on a terminal or in a notebook, but not in a file or a pipe."""
    is_terminal = getattr(sys.stderr, "isatty", None)  # standard error may be None, or an object that only writes
    return bool(is_terminal and is_terminal()) or is_interactive()


def print_above_bars(text: str) -> None:
    """Print to standard output, and leave the bars on standard error intact.

    A file gets the text at once. If it cannot be written, because the disk is full or the reader of a pipe has ended,
    the text is lost, but the run goes on.
    """
    with suppress(OSError):
        tqdm.write(text, file=sys.stdout)
        if sys.stdout is not None:
            sys.stdout.flush()
