"""Read settings from command-line flags and YAML files, with Transformers' `HfArgumentParser`."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import Field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn, get_args, get_type_hints

from transformers.hf_argparser import HfArgumentParser, string_to_bool

from ..errors import SettingsError, refuse, shown
from ..fields import rules_of, traits_of
from ..porting.names import KnownNames, flags, yaml
from .help import HelpPage
from .yaml import read_mapping


class _Parser(HfArgumentParser):
    """A parser that groups the options in its help, and raises SettingsError where argparse would print and exit."""

    def _parse_dataclass_field(self, parser: argparse.ArgumentParser, field: Field) -> None:
        groups = {group.title: group for group in self._action_groups}
        if title := traits_of(field).group:
            parser = groups.get(title) or self.add_argument_group(title)
        plain = copy(field)  # `add_argument` receives all metadata, and rejects `traits`
        metadata = {name: value for name, value in field.metadata.items() if name != "traits"}
        if "help" in metadata:
            metadata["help"] = metadata["help"].replace("%", "%%")  # argparse formats it
        plain.metadata = MappingProxyType(metadata)
        super()._parse_dataclass_field(parser, plain)

    def error(self, message: str) -> NoReturn:
        names, colon, words = message.removeprefix("argument ").partition(": ")
        if colon and names.startswith("-"):
            raise SettingsError([f"`{names.split('/')[0]}` {words.replace('expected', 'needs')}."])
        raise SettingsError([message.capitalize()])


class Parsed(NamedTuple):
    """Options from the command line.

    Attributes:
        options: an instance of each dataclass, after a list of the other words if there may be such words.
        flags, file: the names of the options that the command line and its file give. The others have their defaults.
    """

    options: list[Any]
    flags: set[str]
    file: set[str]


def parse(
    kinds: Sequence[type],
    arguments: Sequence[str],
    *,
    page: HelpPage | None = None,
    elsewhere: Mapping[str, str] | None = None,
    renamed: Mapping[str, str] | None = None,
    positional: str | None = None,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Parsed:
    """Parse flags into one instance of each dataclass in `kinds`, after a list of the other words with `positional`.

    `--config FILE` reads defaults from a YAML file, whose keys are option names or their aliases. Flags override it.
    An option that may be None accepts the word none. A value that cannot be converted stays a string if its field has
    a rule; that rule reports it later.

    Args:
        page: what `--help` and `--help-all` show.
        elsewhere: for each option of other commands, by name, the names of those commands, for a message.
        renamed: for options of `train` that have another name here, that name.
        positional: the name of the words that may come before, between and after the flags, such as RUN.
        defaults: values of any type, by option. `HfArgumentParser` ignores the default of a flag if it is a list.

    Raises:
        SettingsError: if the file cannot be read; for unknown keys or flags, with what to write instead; for values
            that cannot be converted, if their fields have no rules.
        SystemExit: after `--help`.
    """
    parser, words = build_parser(kinds), list(arguments)
    parser.set_defaults(**defaults)
    if positional is not None:
        parser.add_argument(positional, nargs="*")
        words = _with_flag_values(parser, words)
    options = KnownNames(
        [f.name for kind in kinds for f in fields(kind)],
        "option",
        flags,
        elsewhere=elsewhere or {},
        renamed=renamed or {},
        otherwise="in Python",
        listed="`--help-all` lists the options.",
    )
    before = _Parser([], add_help=False, allow_abbrev=False)
    before.add_argument("--config")
    file = before.parse_known_args(arguments)[0].config
    from_file = {} if file is None else _read(Path(file), kinds, replace(options, notation=yaml))
    parser.set_defaults(**from_file)
    if page is not None and any(word in ("-h", "--help", "--help-all") for word in arguments):
        print(page.show(kinds, everything="--help-all" in arguments))
        raise SystemExit(0)
    namespace, others = parser.parse_known_intermixed_args(words)
    if unknown := [word for word in others if re.match("--|-[a-zA-Z]", word)] or others:
        raise SettingsError([f"There is no option {word!r}{options.hint(word.partition('=')[0])}" for word in unknown])
    parsed = list(parser.parse_dict(vars(namespace), allow_extra_keys=True))
    values = parsed if positional is None else [getattr(namespace, positional), *parsed]
    return Parsed(values, _names_in(words, parser), set(from_file))


def _names_in(words: Sequence[str], parser: HfArgumentParser) -> set[str]:
    """Return the names of the options that a command line gives. The parser has accepted it, and loses its defaults."""
    parser._defaults.clear()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_known_intermixed_args(words)[0])) - {"config"}


def build_parser(kinds: Sequence[type]) -> HfArgumentParser:
    """Return the parser of a command. Its options are the fields of `kinds` and `--config`."""
    parser = _Parser(kinds, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of these options; flags override it")
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    ruled = {name for kind in kinds for name in rules_of(kind)}
    for action in parser._actions:
        if action.option_strings[0].startswith("--no_"):
            action.help = f"turns --{action.dest} off"
        if action.type is not None and action.dest in hints:
            convert = string_to_bool if action.type is bool else action.type  # of list[bool]; bool("no") is True
            action.type = _reader(convert, get_args(hints[action.dest]), action.dest in ruled)
    return parser


def _with_flag_values(parser: HfArgumentParser, words: Sequence[str]) -> list[str]:
    """Return the words with `--flag=yes` for a flag that is turned on by its name alone.

    A flag takes the next word as its value, which would be RUN in `--check RUN`.
    """
    flags_of = {option for action in parser._actions if action.nargs == "?" for option in action.option_strings}
    return [
        f"{word}=yes" if word in flags_of and not _is_flag_value(*words[n : n + 1]) else word
        for n, word in enumerate(words, 1)
    ]


def _is_flag_value(word: str = "") -> bool:
    try:
        string_to_bool(word)
    except argparse.ArgumentTypeError:
        return word.lower() in ("on", "off", "none")
    return True


def _reader(convert: Any, kinds_of_value: Sequence[type], has_rule: bool) -> Callable[[str], Any]:
    """Return the function that converts a value from a flag or a file.

    Args:
        convert: the conversion that argparse would use.
        kinds_of_value: the types in the field's annotation, if it has several.
        has_rule: whether the field has a rule, which reports bad values later.
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
            if has_rule or str in kinds_of_value:
                return word
            wanted = {int: "a whole number", float: "a number", string_to_bool: "yes or no"}
            raise argparse.ArgumentTypeError(
                f"must be {wanted.get(convert, 'a different value')}, but is {shown(word)} instead"
            ) from error

    return read


def _read(file: Path, kinds: Sequence[type], options: KnownNames) -> dict[str, Any]:
    """Return the options in a file, by field name. The file may also use the aliases of flags."""
    declared, known = [f for kind in kinds for f in fields(kind)], options.here
    aliases = {alias.lstrip("-"): f.name for f in declared for alias in f.metadata.get("aliases", ())}
    given = read_mapping(file, "--config")
    named = [(key, key if key in known else aliases.get(str(key), key)) for key in given]
    names = [name for _, name in named]
    faults = [
        f"`--config` {str(file)!r} has the unknown key {key!r}{options.hint(str(key))}"
        for key, name in named
        if name not in known
    ]
    faults += [
        f"`--config` {str(file)!r} sets {name!r} twice, once as {key!r}. Keep one of them."
        for key, name in named
        if key != name and names.count(name) > 1
    ]
    refuse(faults)
    return {name: given[key] for key, name in named}
