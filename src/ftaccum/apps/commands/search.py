"""The command `ftaccum search`."""

from collections.abc import Sequence

from ..exit_status import FAILED, OK
from ..options import checked_names, parse_options

_DESCRIPTION = (
    "Searches for the best number of accumulation steps and learning rate at a fixed physical batch size.\n"
    "Run the same command again to resume the search. With `--storage`, any number of machines can share it."
)


def run(words: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    named, adapters, varied, settings, recipe, runtime = parse_options("search", words, _DESCRIPTION)
    named, lora = checked_names(named, "search"), adapters.lora_argument()
    shared = vars(recipe) | vars(runtime) | {"lora": lora, "output_dir": runtime.output_dir or "outputs/search"}

    from accelerate import PartialState

    from ...tasks.load import load, loading
    from ..search.api import search
    from ..search.space import read_dimensions
    from ..search.tables import best_trial
    from ..task_checks import check_search

    arguments = (
        vars(settings)
        | shared
        | {
            "accumulation_steps": varied.accumulation_steps,
            "learning_rate": varied.learning_rate,
            "space": read_dimensions(varied.space),
        }
    )
    check_search(named, arguments)
    with loading(verbosity=runtime.verbosity, progress=runtime.progress):
        loaded = load(named, shared).search_arguments()
    study = search(**loaded, **arguments)
    found, state = best_trial(study) is not None, PartialState()
    if found and not settings.refit and state.is_main_process and runtime.verbosity != "quiet":
        print("No model was saved. To train the best one and save it, run the same command with `--refit`.")
    state.destroy_process_group()
    return OK if found else FAILED
