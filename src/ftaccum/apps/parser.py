"""Command-line flags and YAML files to settings, through Transformers' `HfArgumentParser`."""

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from transformers.hf_argparser import HfArgumentParser, string_to_bool

from ..errors import SettingsError
from ..fields import PositiveInt, Text, rules_of, setting, shown
from .yaml import read_mapping


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside every option; the description as it was written."""


class _Parser(HfArgumentParser):
    """Raises what argparse would print, behind a page of usage."""

    def error(self, message: str) -> NoReturn:
        names, colon, words = message.removeprefix("argument ").partition(": ")
        about_an_option = colon and names.startswith("-")
        raise SettingsError(
            [
                f"`{names.split('/')[0]}` {words.replace('expected', 'needs')}."
                if about_an_option
                else message.capitalize()
            ]
        )


@dataclass
class NamedArguments:
    """A model and rows, by name."""

    model: Text = setting("", "folder or hub name of the model (needed)")
    train_data: Text = setting("", "CSV, JSON or Parquet file, saved folder or hub name[:config] (needed)", "--data")
    task: Text = setting("text-classification", "text-classification or causal-lm")
    text_column: Text = setting("text", "column of the texts")
    label_column: Text = setting("label", "column of the classes, as names or numbers")
    max_train_rows: PositiveInt | None = setting(None, "only the first so many rows; none: all")


@dataclass
class TrainArguments(NamedArguments):
    """What to train on what."""

    val_data: Text | None = setting(None, "the same for validation; none: some are held out")


def parse(
    kinds: Sequence[type],
    arguments: Sequence[str],
    *,
    prog: str | None = None,
    description: str = "",
    elsewhere: Mapping[str, str] | None = None,
) -> Any:
    """Parses flags into one instance of each dataclass in `kinds`.

    `--config FILE` reads a YAML mapping of the same names (or of a flag's other one) first; flags override it. A flag
    that may be None takes the word none. A word that is no value of a field with a rule is handed on,
    for the rule to refuse.

    Args:
        elsewhere: by the name of a field that others have, what to say of who has it.

    Raises:
        SettingsError: for a file that cannot be read, for unknown keys or flags, with the nearest known one, and for
            values of fields without a rule that cannot be parsed.
        SystemExit: after `--help`.
    """
    parser = _Parser(kinds, prog=prog, description=description, formatter_class=_Help)
    parser.add_argument("--config", help="YAML file of these options; flags override what it says")
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    ruled = {name for kind in kinds for name in rules_of(kind)}
    for action in parser._actions:
        if action.option_strings[0].startswith("--no_"):
            action.help = f"turns --{action.dest} off"
        if action.type is not None and action.dest in hints:
            action.type = _reading(action.type, get_args(hints[action.dest]), action.dest in ruled)
    before = _Parser([], add_help=False)
    before.add_argument("--config")
    file = before.parse_known_args(arguments)[0].config
    known = [f.name for kind in kinds for f in fields(kind)]
    if file is not None:
        named = [(f.name, alias) for kind in kinds for f in fields(kind) for alias in f.metadata.get("aliases", ())]
        aliases = {alias.lstrip("-"): name for name, alias in named}
        parser.set_defaults(**_read(Path(file), known, aliases, elsewhere or {}))
    *parsed, others = parser.parse_args_into_dataclasses(list(arguments), return_remaining_strings=True)
    unknown = [word for word in others if word.startswith("--")] or others
    if unknown:
        flags = [f"--{name}" for name in known]
        raise SettingsError(
            [f"There is no option {word!r}. {_instead(word, flags, elsewhere or {})}" for word in unknown]
        )
    return parsed[: len(kinds)]


def _reading(convert: Any, kinds_of_value: Sequence[type], is_ruled: bool) -> Callable[[str], Any]:
    """How the word behind a flag, or a word in a file, is read.

    Args:
        convert: how argparse would read it.
        kinds_of_value: where it may be of several.
        is_ruled: whether somebody else tells what is wrong with it.
    """
    if str in kinds_of_value and int in kinds_of_value:
        convert = int

    def read(word: str) -> Any:
        if type(None) in kinds_of_value and word.lower() == "none":
            return None
        if convert is string_to_bool and word.lower() in ("on", "off"):
            return word.lower() == "on"
        try:
            return convert(word)
        except (ValueError, argparse.ArgumentTypeError) as error:
            if is_ruled:
                return word
            wanted = {int: "a whole number", float: "a number", string_to_bool: "yes or no"}.get(
                convert, "another word"
            )
            raise argparse.ArgumentTypeError(f"must be {wanted}, but is {shown(word)} instead") from error

    return read


def nearest(word: str, known: Sequence[str]) -> str:
    """What to say of a name that is unknown: the one that was probably meant, or all there are."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(known)}."


def _instead(word: str, known: Sequence[str], elsewhere: Mapping[str, str]) -> str:
    """What to say of a name that is unknown here: who has it, or `nearest`."""
    who = elsewhere.get(word.partition("=")[0].lstrip("-").replace("-", "_"))
    if who is None:
        return nearest(word, known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.8)
    return who + (f" Did you mean {near[0]!r}?" if near else "")


def _read(file: Path, known: list[str], aliases: Mapping[str, str], elsewhere: Mapping[str, str]) -> dict[str, Any]:
    """The options in a file, by the names of their fields.

    Args:
        aliases: by the other name of a flag, the field's.
    """
    given = read_mapping(file, "--config")
    named = [(key, aliases.get(str(key), key) if key not in known else key) for key in given]
    faults = [
        f"`--config` {str(file)!r} has the unknown key {key!r}. {_instead(str(key), known, elsewhere)}"
        for key, name in named
        if name not in known
    ]
    names = [name for _, name in named]
    faults += [
        f"`--config` {str(file)!r} says {name!r} twice, once as {key!r}. Keep one of them."
        for key, name in named
        if key != name and names.count(name) > 1
    ]
    if faults:
        raise SettingsError(faults)
    return {name: given[key] for key, name in named}
