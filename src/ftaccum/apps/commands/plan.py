"""The command `ftaccum plan`."""

from collections.abc import Sequence

from ..exit_status import OK
from ..memory.options import read_memory_options
from ..options import parse_options
from ..plan import plan

_DESCRIPTION = (
    "Computes the batch sizes and updates of a run. Loads no model or data. With --model, it also estimates the memory "
    "of each process, from the model's config alone."
)


def run(words: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    arguments, recipe, *others = parse_options("plan", words, _DESCRIPTION)
    named, memory_recipe, runtime = read_memory_options(others)
    shown = [str(plan(**vars(arguments), **vars(recipe)))]
    if named.model is not None:
        from ..memory.table import memory_table  # it loads torch and Transformers

        shown.append(memory_table(named, memory_recipe, runtime, arguments.batch_size, arguments.num_processes))
    print("\n\n".join(shown))
    return OK
