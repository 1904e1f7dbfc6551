"""The command that the user typed, to show the one that resumes the run."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from ..settings.runtime import Runtime

# Programs that start `ftaccum` and belong to the command that resumes it; `timeout`, for example, does not.
_LAUNCHING_MODULES = {"accelerate.commands.launch", "torch.distributed.run"}
_LAUNCHERS = {"accelerate", "torchrun", "uv", "uvx", "poetry", "pixi", "srun"}


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
    """Return what was typed before these words: the name of the program, and its launcher if that is a known one."""
    own = ["python", "-m", "ftaccum"] if Path(sys.argv[0]).name == "__main__.py" else ["ftaccum"]
    if sys.argv[1:] != list(words):  # a call of `main` from Python
        return ["ftaccum"]
    try:
        parent = psutil.Process().parent()
        typed = parent.cmdline() if parent is not None else []
    except psutil.Error:  # another user's process, or one that has just ended
        typed = []
    if len(typed) <= len(words) or typed[-len(words) :] != list(words):
        return own
    launcher = _launcher_in(typed[: -len(words)])
    return launcher or own


def _launcher_in(typed: Sequence[str]) -> list[str]:
    """Return the words from the launcher on, with its name in place of its path; nothing if there is none."""
    for n, word in enumerate(typed):
        name = Path(word).name
        if name in _LAUNCHERS:
            return [name, *typed[n + 1 :]]
        if name in _LAUNCHING_MODULES:
            return ["python", "-m", *typed[n:]]
    return []
