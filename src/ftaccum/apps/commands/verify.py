"""The command `ftaccum verify`."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ...arguments import find_faults, parse_settings
from ...errors import refuse
from ...tasks.arguments import TrainArguments
from ..exit_status import FAILED, OK
from ..options import check_output_file, checked_names, parse_options

_DESCRIPTION = (
    "Accumulates the gradient of one update in many ways, and compares each with the gradient of the same rows\n"
    "in one batch. The rows are split as in training, one by one, and in random orders and sizes. Shorter windows\n"
    "test an epoch's last update. The table also shows the errors of `loss / k` and of Transformers' Trainer.\n"
    "The model runs in train mode without dropout, in float64 if possible, and is not trained. If the rows of an\n"
    "update do not fit in memory together, fewer of them are compared. This can take minutes on a CPU.\n\n"
    "Exit status: 0 if accumulating is exact up to rounding, 1 if it is not, 2 for bad input."
)


def run(words: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    named, adapters, output, settings, recipe, runtime = parse_options("verify", words, _DESCRIPTION)
    named, lora = checked_names(named, "verify"), adapters.lora_argument()
    if output.json not in (None, "-"):
        check_output_file("json", output.json)

    parse_settings(vars(recipe) | vars(runtime))
    refuse(find_faults(settings))
    with contextlib.redirect_stdout(sys.stderr):  # keep standard output for the table
        from accelerate import PartialState

        from ...tasks.load import load, loading
        from ..verify.api import verify

        with loading(verbosity=runtime.verbosity, progress=runtime.progress):
            loaded = load(TrainArguments(**vars(named)), vars(recipe) | {"validation_split": 0.0})
        arguments = loaded.more | vars(settings) | vars(recipe) | vars(runtime) | {"lora": lora}
        found = verify(loaded.model, loaded.train, tokenizer=loaded.tokenizer, **arguments)
        state = PartialState()
    if state.is_main_process:
        if output.json not in (None, "-"):
            found.save(Path(output.json).expanduser())
        print(found.to_json() if output.json == "-" else found)
    state.destroy_process_group()
    return OK if found.exact else FAILED
