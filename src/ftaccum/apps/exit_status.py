"""The exit statuses of the `ftaccum` command, and the errors that lead to them."""

import os
import sys
from collections.abc import Callable

from ..errors import DataError, DivergedError, SettingsError

OK = 0
FAILED = 1  # training diverged, an output could not be written, a search found nothing, or accumulating is not exact
BAD_INPUT = 2
INTERRUPTED = 130


def run_and_report(name: str, run: Callable[[], int], after_interrupt: str = ".") -> int:
    """Call a function, print its expected errors, and return its exit status.

    Args:
        name: what precedes the message of an error.
        run: the function, which returns an exit status.
        after_interrupt: the rest of the sentence that is printed after Ctrl-C.
    """
    try:
        return run()
    except (SettingsError, DataError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return BAD_INPUT
    except DivergedError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # the reader of the output has what it wanted, as in `ftaccum train --help-all | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
        return OK
    except KeyboardInterrupt:
        print(f"{name}: interrupted{after_interrupt}", file=sys.stderr)
        return INTERRUPTED
