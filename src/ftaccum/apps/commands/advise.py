"""The command `ftaccum advise`."""

from collections.abc import Sequence
from pathlib import Path

from ..advise.noise import describe_run
from ..advise.options import checked
from ..exit_status import INTERRUPTED, OK
from ..options import check_output_file, parse_options

_DESCRIPTION = (
    "Says whether a larger batch would help a run: `ftaccum advise RUN` prints the noise scale that the run has\n"
    "measured. RUN is its output folder. With --check, it continues the run's checkpoint at half, the same and twice\n"
    "the batch, on the same rows, and compares the losses. This trains; the cost is printed first, and nothing in RUN\n"
    "is changed."
)


def run(words: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    source, *given = parse_options("advise", words, _DESCRIPTION)
    options, runtime = checked(*given)
    if options.json is not None:
        check_output_file("json", options.json)
    folder = Path(source).expanduser()
    if not options.check:
        print(describe_run(folder))
        return OK

    # These imports take seconds, so check the input first.
    from accelerate import PartialState

    from ..advise.check import check_run

    is_complete = check_run(folder, options, runtime)
    PartialState().destroy_process_group()
    return OK if is_complete else INTERRUPTED
