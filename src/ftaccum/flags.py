"""Command-line flags and YAML files to settings, through Transformers' `HfArgumentParser`."""

import argparse
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from transformers.hf_argparser import HfArgumentParser

from .errors import SettingsError


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside every option; the description as it was written."""


@dataclass
class NamedArguments:
    """A model and rows, by name."""

    model: str = field(default="", metadata={"help": "folder or hub name of the model (needed)"})
    train_data: str = field(
        default="",
        metadata={
            "help": "CSV, JSON or Parquet file, saved folder or hub name[:config] (needed)",
            "aliases": ["--data"],
        },
    )
    task: str = field(default="text-classification", metadata={"help": "text-classification or causal-lm"})
    text_column: str = field(default="text", metadata={"help": "column of the texts"})
    label_column: str = field(default="label", metadata={"help": "column of the classes, as names or numbers"})
    max_train_rows: int | None = field(default=None, metadata={"help": "only the first so many rows; none: all"})


@dataclass
class TrainArguments(NamedArguments):
    """What to train on what."""

    val_data: str | None = field(default=None, metadata={"help": "the same for validation; none: some are held out"})


def parse(kinds: Sequence[type], arguments: Sequence[str], *, prog: str | None = None, description: str = "") -> Any:
    """Parses flags into one instance of each dataclass in `kinds`.

    `--config FILE` reads a YAML mapping of the same names first; flags override it. A flag that may be None takes the
    word none.

    Raises:
        SettingsError: for a file that cannot be read, and for unknown keys or flags, with the nearest known one.
        SystemExit: for values that cannot be parsed, as argparse does.
    """
    parser = HfArgumentParser(kinds, prog=prog, description=description, formatter_class=_Help)
    parser.add_argument("--config", help="YAML file of these options; flags override what it says")
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    for action in parser._actions:
        if action.option_strings[0].startswith("--no_"):
            action.help = f"turns --{action.dest} off"
        kinds_of_value = get_args(hints.get(action.dest))
        if action.type is not None and str in kinds_of_value and int in kinds_of_value:
            action.type = _number_or_word
        if action.type is not None and type(None) in kinds_of_value:
            action.type = _or_none(action.type)
    before = argparse.ArgumentParser(add_help=False)
    before.add_argument("--config")
    file = before.parse_known_args(arguments)[0].config
    known = [f.name for kind in kinds for f in fields(kind)]
    if file is not None:
        parser.set_defaults(**_read(Path(file), known))
    *parsed, others = parser.parse_args_into_dataclasses(list(arguments), return_remaining_strings=True)
    unknown = [word for word in others if word.startswith("--")] or others
    if unknown:
        flags = [f"--{name}" for name in known]
        raise SettingsError([f"There is no option {word!r}. {nearest(word, flags)}" for word in unknown])
    return parsed[: len(kinds)]


def nearest(word: str, known: Sequence[str]) -> str:
    """What to say of a name that is unknown: the one that was probably meant, or all there are."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(known)}."


def _or_none(convert: Any) -> Callable[[str], Any]:
    def converted(word: str) -> Any:
        return None if word.lower() == "none" else convert(word)

    converted.__name__ = getattr(convert, "__name__", "value")  # argparse names it in its messages
    return converted


def _number_or_word(word: str) -> int | str:
    try:
        return int(word)
    except ValueError:
        return word


def _read(file: Path, known: list[str]) -> dict[str, Any]:
    try:
        read = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError([f"`--config` {str(file)!r} cannot be read: {error}"]) from error
    if not isinstance(read, dict):
        raise SettingsError([f"`--config` {str(file)!r} must hold `name: value` lines, but holds {read!r} instead."])
    faults = []
    for key in read.keys() - set(known):
        faults.append(f"`--config` {str(file)!r} has the unknown key {key!r}. {nearest(str(key), known)}")
    if faults:
        raise SettingsError(faults)
    return read
