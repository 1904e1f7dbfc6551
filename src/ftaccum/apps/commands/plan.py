"""The command `ftaccum plan`."""

from collections.abc import Sequence

from ..exit_status import OK
from ..options import parse_options
from ..plan import plan

_DESCRIPTION = "Computes the batch sizes and updates of a run. Loads no model or data."


def run(words: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    arguments, recipe = parse_options("plan", words, _DESCRIPTION)
    print(plan(**vars(arguments), **vars(recipe)))
    return OK
