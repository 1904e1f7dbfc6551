"""The command `ftaccum merge`."""

from collections.abc import Sequence

from ...arguments import find_faults
from ...errors import refuse
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
    source = words[0] if words and not words[0].startswith("-") else None
    (arguments,) = parse_options("merge", words[1:] if source else words, _DESCRIPTION)
    missing = {
        "`RUN` is required: the output folder of a run, as in `ftaccum merge RUN --output DIR`.": source is None,
        "`--output` is required. `ftaccum merge --help` describes it.": not arguments.output,
    }
    refuse([sentence for sentence, holds in missing.items() if holds] or find_faults(arguments))
    assert source is not None
    folder = merge_run(source, arguments.output, arguments.base)
    print(f"Merged {folder} into {arguments.output}.")
    return OK
