"""The command `ftaccum eval`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..exit_status import OK
from ..options import check_output_file, parse_options
from ..trained_options import checked

_DESCRIPTION = (
    "Evaluates a trained model on labelled rows: prints the loss and the metrics of its task.\n"
    "`ftaccum eval RUN --data test.csv`. RUN is an output folder, or a folder or hub name of a model.\n"
    "With `accelerate launch -m ftaccum eval …`, all processes share the rows."
)


def run(words: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    source, named, output, recipe, runtime = parse_options("eval", words, _DESCRIPTION)
    named, settings = checked(named, output, recipe, runtime)
    if output.json is not None:
        check_output_file("json", output.json)

    # These imports take seconds, so check the input first.
    from accelerate import PartialState

    from ...tasks.load import loading
    from ...tasks.trained import load_trained
    from ...tracking.result_file import write_values
    from ...training.evaluate_rows import evaluate_rows
    from ..trained_config import trained_config

    with loading(verbosity=runtime.verbosity, progress=runtime.progress):
        trained = load_trained(source, named, settings, needs_targets=True)
    evaluation = trained.task.evaluation_arguments(trained.processor, trained.model)
    found, state = evaluate_rows(trained_config(trained, evaluation)), PartialState()
    if state.is_main_process:
        print(f"rows  {found.n_rows:,}", f"loss  {found.loss:.6g}", sep="\n")
        print(*(f"{name}  {value:.6g}" for name, value in found.metrics.items()), sep="\n")
        if output.json is not None:
            write_values(asdict(found), Path(output.json).expanduser())
    state.destroy_process_group()
    return OK
