"""The command `ftaccum train`."""

from collections.abc import Sequence
from dataclasses import replace

from ...arguments import parse_settings
from ...errors import refuse
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

    from ...runtime.accelerator import is_first_process
    from ...tasks.load import load, loading, make_task
    from ...training.adapters import fault_of_save
    from ...training.config import RunConfig, faults_of_evaluation
    from ...training.preflight import faults_before_loading
    from ...training.run import run_training
    from ..output_folder import OUTPUTS, output_folder
    from ..run_arguments import default_arguments

    settings = vars(recipe) | vars(runtime) | {"lora": lora}
    given = settings if runtime.output_dir is not None else settings | {"output_dir": OUTPUTS}
    task = make_task(named)
    has_val_data = named.val_data is not None
    measures = bool(task.metrics) and (has_val_data or recipe.validation_split > 0)
    faults = faults_before_loading(given, looks_at_files=is_first_process())
    faults = faults or [fault for fault in [fault_of_save(runtime.save, has_adapters=lora is not None)] if fault]
    refuse(faults or faults_of_evaluation(recipe, has_metrics=measures, has_val_data=has_val_data))
    recipe, parsed = parse_settings(given)
    task.check(recipe)
    with loading(verbosity=runtime.verbosity, progress=runtime.progress):
        loaded = load(named, given)
    parsed = replace(parsed, output_dir=runtime.output_dir)
    with output_folder(named, lora, recipe, parsed, words) as (folder, command):
        arguments = default_arguments() | loaded.arguments() | settings | {"output_dir": folder}
        result = run_training(replace(RunConfig.from_arguments(arguments), command=command))
    PartialState().destroy_process_group()
    return FAILED if result.unwritten else OK
