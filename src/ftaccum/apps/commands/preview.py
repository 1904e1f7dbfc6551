"""The command `ftaccum preview`."""

from collections.abc import Sequence

from ...arguments import find_faults
from ...errors import refuse
from ..exit_status import OK
from ..options import checked_names, parse_options

_DESCRIPTION = (
    "Shows what `ftaccum train` with the same options would do, without training: rows as the model sees them, the\n"
    "sizes of batches and updates, memory and time. A `·` is a label that the loss ignores."
)


def run(words: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    shown, named, adapters, recipe, runtime = parse_options("preview", words, _DESCRIPTION)
    named, lora = checked_names(named, "preview"), adapters.lora_argument()
    refuse(find_faults(shown))

    # These imports take seconds, so check the input first.
    from accelerate import PartialState

    from ...tasks.load import load, loading
    from ...training.config import RunConfig
    from ...training.preview import PreviewRun
    from ..run_arguments import default_arguments

    unused = {"output_dir": None, "resume": None, "push_to_hub": None}
    settings = vars(recipe) | vars(runtime) | unused | {"on_inexact": "ignore", "lora": lora}
    with loading(verbosity=runtime.verbosity, progress=runtime.progress):
        loaded = load(named, settings)
    with PreviewRun(RunConfig.from_arguments(default_arguments() | loaded.arguments() | settings)) as run:
        text = run.preview(shown.rows)
        if run.process_group.is_main:
            print(text)
    PartialState().destroy_process_group()
    return OK
