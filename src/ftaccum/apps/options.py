"""The options of each command, and how they are parsed. This module does not load torch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..arguments import find_faults, read_settings
from ..errors import SettingsError, refuse
from ..fields import Count, setting
from ..settings.recipe import Recipe
from ..settings.runtime import Runtime
from ..tasks.adapter_options import AdapterOptions
from ..tasks.arguments import NamedArguments, TrainArguments, TrainedArguments
from .advise.options import AdviseOptions, AdviseRuntime
from .help import HelpPage
from .memory.options import MemoryRecipe, MemoryRuntime, PlannedModel
from .merge import MergeArguments
from .parser import parse
from .plan import PlanArguments, PlanRecipe
from .report import ReportArguments
from .search.settings import SearchSettings, SpaceArguments, TrialRecipe
from .trained_options import EvaluationOutput, EvaluationRecipe, EvaluationRuntime, PredictionOutput
from .verify.settings import VerifyOutput, VerifyRecipe, VerifyRuntime, VerifySettings


@dataclass
class PreviewOptions:
    """The options of `ftaccum preview` besides those of `ftaccum train`."""

    rows: Count = setting(3, "rows to show as the model sees them", group="model and data")


# The options of a command are the fields of these dataclasses.
OPTIONS: dict[str, list[type]] = {
    "train": [TrainArguments, AdapterOptions, Recipe, Runtime],
    "preview": [PreviewOptions, TrainArguments, AdapterOptions, Recipe, Runtime],
    "search": [TrainArguments, AdapterOptions, SpaceArguments, SearchSettings, TrialRecipe, Runtime],
    "verify": [NamedArguments, AdapterOptions, VerifyOutput, VerifySettings, VerifyRecipe, VerifyRuntime],
    "plan": [PlanArguments, PlanRecipe, PlannedModel, MemoryRecipe, MemoryRuntime],
    "report": [ReportArguments],
    "merge": [MergeArguments],
    "advise": [AdviseOptions, AdviseRuntime],
    "eval": [TrainedArguments, EvaluationOutput, EvaluationRecipe, EvaluationRuntime],
    "predict": [TrainedArguments, PredictionOutput, EvaluationRecipe, EvaluationRuntime],
}

_DATA = ("model", "train_data", "val_data", "task", "max_length")
# The options that most people need, which `--help` shows. Commands that are not here show all of theirs.
FIRST_OPTIONS = {
    "train": (*_DATA, "batch_size", "effective_batch_size", "n_epochs", "learning_rate", "output_dir"),
    "preview": (*_DATA, "rows", "batch_size", "effective_batch_size", "n_epochs"),
    "search": (*_DATA[:-1], "batch_size", "accumulation_steps", "learning_rate", "n_trials", "n_epochs", "output_dir"),
    "verify": ("model", "train_data", "task", "max_length", "batch_size", "effective_batch_size", "n_splits", "json"),
}
_USAGE = {
    "train": "ftaccum train --model NAME --train_data FILE [options]",
    "search": "ftaccum search --model NAME --train_data FILE [options]",
    "verify": "ftaccum verify --model NAME --train_data FILE [options]",
    "report": "ftaccum report RUN [RUN …] [options]",
    "merge": "ftaccum merge RUN --output DIR [options]",
    "advise": "ftaccum advise RUN [--check] [options]",
    "eval": "ftaccum eval RUN --data FILE [options]",
    "predict": "ftaccum predict RUN --data FILE --output FILE [options]",
    "plan": "ftaccum plan --n_rows N [options]",
}

# The words that a command takes besides its options: how to call it, and whether it takes several.
_RUNS = {
    "report": ("the output folders of runs, as in `ftaccum report outputs/mine`", True),
    "merge": ("the output folder of a run, as in `ftaccum merge RUN --output DIR`", False),
    "advise": ("the output folder of a run, as in `ftaccum advise RUN --check`", False),
    "eval": ("the output folder of a run, as in `ftaccum eval RUN --data test.csv`", False),
    "predict": ("the output folder of a run, as in `ftaccum predict RUN --data test.csv`", False),
}

# The option of a search that stands for another option of a single run.
_RENAMED = {"gradient_accumulation_steps": "accumulation_steps"}


def parse_options(command: str, words: Sequence[str], description: str) -> Any:
    """Parse the options of a command into one instance of each of its dataclasses.

    For a command that takes RUN, it or the list of several comes first. RUN may come before or after the options.

    Raises:
        SettingsError: for unknown options, and if RUN is missing or there are too many.
    """
    options = {each: {f.name for kind in kinds for f in fields(kind)} for each, kinds in OPTIONS.items()}
    elsewhere = {
        option: ", ".join(f"`ftaccum {each}`" for each in options if option in options[each])
        for option in set().union(*options.values()) - options[command]
    }
    parsed = parse(
        OPTIONS[command],
        words,
        page=HelpPage(_USAGE.get(command, f"ftaccum {command} [options]"), description, FIRST_OPTIONS.get(command, ())),
        elsewhere=elsewhere,
        renamed=_RENAMED if command == "search" else None,
        positional="RUN" if command in _RUNS else None,
    ).options
    return parsed if command not in _RUNS else [_checked_runs(command, parsed[0]), *parsed[1:]]


def _checked_runs(command: str, runs: Sequence[str]) -> Any:
    """Return the words that a command was given as RUN, or the only one for a command that takes one."""
    meaning, takes_several = _RUNS[command]
    if not runs:
        raise SettingsError([f"RUN is required: {meaning}."])
    if takes_several:
        return runs
    if len(runs) > 1:
        given = ", ".join(map(repr, runs))
        raise SettingsError([f"`ftaccum {command}` takes one RUN, but {len(runs)} were given: {given}."])
    return runs[0]


def check_output_file(option: str, name: str) -> None:
    """Check that a file can be written.

    Args:
        option: the option that names the file.
        name: the path of the file.

    Raises:
        SettingsError: if the file is a folder, or is in a folder that does not exist or cannot be written to.
    """
    path = Path(name).expanduser()
    if not path.parent.is_dir():
        raise SettingsError([f"`--{option}` {name!r} is in a folder that does not exist. Create the folder first."])
    if path.is_dir():
        raise SettingsError([f"`--{option}` {name!r} is a folder. Give the name of a file."])
    is_device = path.exists() and not path.is_file()  # such as /dev/stdout
    if not is_device and not os.access(path.parent, os.W_OK):
        raise SettingsError([f"`--{option}` {name!r} is in a folder without write permission. Give another folder."])


def checked_names(named: Any, command: str) -> Any:
    """Return the names of a model and its data with each value parsed.

    Raises:
        SettingsError: if one is missing or breaks its rule.
    """
    needed = [name for name in ("model", "train_data") if not getattr(named, name)]
    if needed:
        raise SettingsError([f"`--{name}` is required. `ftaccum {command} --help` describes it." for name in needed])
    named = read_settings(type(named), vars(named))
    refuse(find_faults(named))
    return named
