"""The command `ftaccum merge`."""

from collections.abc import Sequence

from ...arguments import find_faults
from ...errors import SettingsError, refuse
from ..exit_status import OK
from ..merge import merge_run
from ..options import parse_options

_DESCRIPTION = (
    "Merges the adapters of a run into their base model, and writes a plain model with its tokenizer, which\n"
    "`from_pretrained` and `pipeline` load without peft. RUN is an output folder, or a folder of adapters:\n"
    "`ftaccum merge RUN --output DIR`."
)


def run(words: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    source, arguments = parse_options("merge", words, _DESCRIPTION)
    if not arguments.output:
        raise SettingsError(["`--output` is required. `ftaccum merge --help` describes it."])
    refuse(find_faults(arguments))
    folder = merge_run(source, arguments.output, arguments.base)
    print(f"Merged {folder} into {arguments.output}.")
    return OK
