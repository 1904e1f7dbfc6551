"""The command `ftaccum predict`."""

from collections.abc import Sequence

from ..exit_status import OK
from ..options import parse_options
from ..trained_options import checked

_DESCRIPTION = (
    "Predicts rows with a trained model, and writes them with their predictions, in order, each once.\n"
    "`ftaccum predict RUN --data new.csv --output predictions.csv`. The rows need no labels. RUN is an output folder,\n"
    "or a folder or hub name of a model. With `accelerate launch -m ftaccum predict …`, all processes share the rows."
)


def run(words: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    source, named, output, recipe, runtime = parse_options("predict", words, _DESCRIPTION)
    named, settings = checked(named, output, recipe, runtime)

    from ..prediction_file import check_output, write_predictions

    check_output(output.output)

    # These imports take seconds, so check the input first.
    from accelerate import PartialState

    from ...tasks.load import loading
    from ...tasks.trained import load_trained
    from ...training.predict_rows import predict_rows
    from ..trained_config import trained_config

    with loading(verbosity=runtime.verbosity, progress=runtime.progress):
        trained = load_trained(source, named, settings, needs_targets=False)
    prediction = trained.task.prediction_arguments(trained.processor, trained.model, named.max_new_tokens)
    predictions, state = predict_rows(trained_config(trained, prediction)), PartialState()
    if state.is_main_process:
        columns = trained.task.predicted_columns(predictions, trained.rows, trained.processor, trained.model)
        write_predictions(output.output, trained.raw, columns)
        print(f"Wrote {len(trained.raw):,} rows to {output.output}, with the columns {', '.join(columns)}.")
    state.destroy_process_group()
    return OK
