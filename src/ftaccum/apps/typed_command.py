"""The command that the user typed, to show the one that resumes the run."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from ..settings import Runtime


def resume_command(words: Sequence[str], runtime: Runtime, folder: str) -> str:
    """Return the command that resumes a run of `ftaccum train`.

    Args:
        words: the options of the command as typed.
        runtime: the settings that they give.
        folder: the output folder of the run.
    """
    added = [] if runtime.resume == "auto" else ["--resume", "auto"]  # the last of several flags counts
    added += [] if runtime.output_dir is not None else ["--output_dir", folder]
    return shlex.join([*_typed_before(["train", *words]), "train", *words, *added])


def _typed_before(words: Sequence[str]) -> list[str]:
    """Return what was typed before these words: the name of the program, and its launcher if there is one."""
    if sys.argv[1:] != list(words):  # a call of `main` from Python
        return ["ftaccum"]
    try:
        parent = psutil.Process().parent()
        typed = parent.cmdline() if parent is not None else []
    except psutil.Error:  # another user's process, or one that has just ended
        typed = []
    if len(typed) > len(words) and typed[-len(words) :] == list(words):  # `accelerate launch`, `torchrun`, `uv run`
        return _without_paths(typed[: -len(words)])
    return ["python", "-m", "ftaccum"] if Path(sys.argv[0]).name == "__main__.py" else [Path(sys.argv[0]).name]


def _without_paths(typed: Sequence[str]) -> list[str]:
    """Return a program and its arguments, with the name of a script in place of the interpreter and its path."""
    program, *rest = typed
    if Path(program).name.startswith("python") and rest and not rest[0].startswith("-"):
        program, *rest = rest
    return [Path(program).name, *rest]
