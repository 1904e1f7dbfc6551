"""The `ftaccum` command: a thin layer over the Python functions. Its options have the names of their arguments."""

import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from .exit_status import BAD_INPUT, OK, run_and_report

COMMANDS = {
    "train": "fine-tune a model on files or hub data",
    "preview": "show rows as the model sees them, batch sizes, memory and time, without training",
    "eval": "measure a trained model on labelled rows",
    "predict": "write the predictions of a trained model to a file",
    "search": "find accumulation steps and learning rate at a fixed physical batch",
    "verify": "check on your model and rows that accumulation equals one large batch",
    "plan": "compute the batch sizes and updates of a run without running it",
    "advise": "say whether a larger batch would help a run, or try it from the run's checkpoint",
    "report": "write one HTML page with the curves, results and settings of runs",
    "merge": "write the adapters of a run and their base model as one plain model",
}

_USAGE = """usage: ftaccum COMMAND [options]

Fine-tuning where gradient accumulation is exactly a large batch.

commands:
{commands}

`ftaccum COMMAND --help` lists a command's options, and `ftaccum --version` shows the version. For several processes:
`accelerate launch -m ftaccum train …`.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Returns:
        0 on success; 1 if training diverged, an output could not be written, a search finished no trial, or
        accumulating is not exact; 2 for bad input; 130 after Ctrl-C.

    Raises:
        Preempted: if a scheduler stopped training. The process exits with status 75.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        return _help(words)
    if words[0] == "--version":
        print(f"ftaccum {__version__}")
        return OK
    command, *options = words
    if command not in COMMANDS:
        print(f"ftaccum: there is no command {command!r}.\n\n{_usage()}", end="", file=sys.stderr)
        return BAD_INPUT
    after_interrupt = ". The same command resumes the search." if command == "search" else "."
    module = import_module(f"{__package__}.commands.{command}")
    return run_and_report(f"ftaccum {command}", lambda: int(module.run(options)), after_interrupt)


def _help(words: Sequence[str]) -> int:
    """Print how to use `ftaccum`, or the command that `ftaccum help COMMAND` names."""
    if words[:1] == ["help"] and len(words) > 1:
        return main([words[1], "--help"])
    print(_usage(), end="")
    return OK if words else BAD_INPUT


def _usage() -> str:
    return _USAGE.format(commands="\n".join(f"  {name:<8}{summary}" for name, summary in COMMANDS.items()))
