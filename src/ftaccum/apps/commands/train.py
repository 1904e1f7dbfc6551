"""The command `ftaccum train`."""

from collections.abc import Sequence
from dataclasses import replace

from ..exit_status import FAILED, OK
from ..options import checked_names, parse_options

_DESCRIPTION = (
    "Fine-tunes a model. Exit status: 0 on success; 1 if the ledger, the result or the model could not be\n"
    "written or uploaded, or if updates were not finite; 2 for bad input, before any training;\n"
    "75 after SIGTERM or SIGUSR1; 130 after Ctrl-C. `--resume auto` resumes an interrupted run.\n\n"
    "Without `--output_dir`, the folder is outputs/MODEL-DATA-DATE, and `--resume auto` resumes the newest\n"
    "unfinished run in outputs/ that has the same settings."
)


def run(words: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    named, adapters, recipe, runtime = parse_options("train", words, _DESCRIPTION)
    named, lora = checked_names(named, "train"), adapters.lora_argument()

    # These imports take seconds, so check the input first.
    from accelerate import PartialState

    from ...tasks.load import load, loading
    from ...training.config import RunConfig
    from ...training.run import run_training
    from ..output_folder import OUTPUTS, output_folder
    from ..run_arguments import default_arguments
    from ..task_checks import check_training

    settings = vars(recipe) | vars(runtime) | {"lora": lora}
    given = settings if runtime.output_dir is not None else settings | {"output_dir": OUTPUTS}
    recipe, parsed = check_training(named, given)
    with loading(verbosity=runtime.verbosity, progress=runtime.progress):
        loaded = load(named, given)
    parsed = replace(parsed, output_dir=runtime.output_dir)
    with output_folder(named, lora, recipe, parsed, words) as (folder, command):
        arguments = default_arguments() | loaded.arguments() | settings | {"output_dir": folder}
        result = run_training(replace(RunConfig.from_arguments(arguments), command=command))
    PartialState().destroy_process_group()
    return FAILED if result.unwritten else OK
