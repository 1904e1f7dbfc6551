"""The options that a training script declares itself: the fields of a dataclass."""

from collections.abc import Sequence
from dataclasses import Field, field, fields, is_dataclass, make_dataclass
from inspect import Parameter, signature
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import DataError, SettingsError, refuse, shown
from ..fields import rules_of

_WORDS = {bool: "True or False", int: "an integer", float: "a number", str: "a text", Path: "a path"}


def declared_options(extra: type, others: Sequence[type]) -> type:
    """Return a dataclass of a script's extra options, without the methods of the script's class.

    The options are parsed and checked in it, so that `__post_init__` runs once, on checked values.

    Args:
        extra: the dataclass of the script.
        others: the dataclasses of its other options.

    Raises:
        SettingsError: if `extra` is no dataclass; and for fields without a default, with a name that is taken, or of a
            type that the command line cannot give.
    """
    if not (isinstance(extra, type) and is_dataclass(extra)):
        refuse([f"`extra` must be a dataclass, but is {shown(extra)} instead. Decorate it with `@dataclass`."])
    hints, plain_hints = get_type_hints(extra, include_extras=True), get_type_hints(extra)
    declared = [
        (f.name, hints[f.name], field(default=f.default, default_factory=f.default_factory, metadata=f.metadata))
        for f in fields(extra)
        if f.init
    ]
    options = make_dataclass(extra.__name__, declared, kw_only=True)
    needed = [name for name, each in signature(extra).parameters.items() if each.default is Parameter.empty]
    faults = [f"`extra` has the field {name!r} without a default. Give it one." for name in needed]
    faults += [
        f"`extra` has the field {f.name!r} of a type that no option can have. Use bool, int, float, str, Path, Literal "
        "or a list of one of them, and `| None`."
        for f in plain_fields(options)
        if not _can_be_given(plain_hints[f.name])
    ]
    refuse(faults + _faults_of_flags(options, others))
    return options


def read_extra_options(parsed: Any) -> list[str]:
    """Convert the values of a script's extra options to their types, and return a sentence for each that has another.

    A YAML file may have given a value of any type.

    Args:
        parsed: an instance of the dataclass of `declared_options`.
    """
    hints = get_type_hints(type(parsed))
    faults = []
    for f in plain_fields(type(parsed)):
        value, hint = getattr(parsed, f.name), hints[f.name]
        setattr(parsed, f.name, _converted(value, hint))
        if value is not f.default and not _fits(getattr(parsed, f.name), hint):
            faults.append(f"`{f.name}` must be {_describe(hint)}, but is {shown(value)} instead.")
    return faults


def make_extra_options(extra: type, parsed: Any) -> Any:
    """Return an instance of the dataclass of a script, with the values of an instance of another one.

    Raises:
        SettingsError: if its `__post_init__` raises ValueError.
    """
    try:
        return extra(**vars(parsed))
    except (SettingsError, DataError):
        raise
    except ValueError as error:
        raise SettingsError([str(error) or f"`{extra.__name__}` refuses its values."]) from error


def plain_fields(extra: type) -> list[Field]:
    """Return the fields that the script declares, without those of ftaccum, which have rules or conversions."""
    ruled = rules_of(extra)
    return [f for f in fields(extra) if f.name not in ruled and "traits" not in f.metadata]


def _faults_of_flags(options: type, others: Sequence[type]) -> list[str]:
    """Return a sentence for each field that would have a flag of another option, or of a field before it."""
    taken = {"-h", "--help", "--help-all", "--config"}
    for kind in others:
        taken.update(*_flags(kind).values())
    faults = []
    for name, flags in _flags(options).items():
        if clash := next((flag for flag in flags if flag in taken), None):
            faults.append(
                f"`extra` has the field {name!r}, but {clash!r} is a flag of another option. Give it another name."
            )
        taken.update(flags)
    return faults


def _flags(kind: type) -> dict[str, list[str]]:
    """Return the flags of each option, with - for _: it can be written with both."""
    hints, found = get_type_hints(kind), {}
    for f in fields(kind):
        aliases = f.metadata.get("aliases", ())
        flags = [f"--{f.name}", *([aliases] if isinstance(aliases, str) else aliases)]
        if bool in _kinds(hints[f.name]):  # turns a flag off that is on by default; `run_script` may change the default
            flags.append(f"--no_{f.name}")
        found[f.name] = [flag.replace("_", "-") for flag in flags]
    return found


def _can_be_given(hint: Any) -> bool:
    """Return whether the command line can give a value of this type."""
    kinds = _kinds(hint)
    return all(map(_is_supported, kinds)) and (len(kinds) == 1 or str in kinds)


def _kinds(hint: Any) -> list[Any]:
    """Return the types that a type hint allows, without None."""
    if get_origin(hint) in (Union, UnionType):
        return [kind for kind in get_args(hint) if kind is not type(None)]
    return [hint]


def _is_supported(kind: Any) -> bool:
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return item in _WORDS
    return kind in _WORDS or get_origin(kind) is Literal


def _converted(value: Any, hint: Any) -> Any:
    """Return a value as the first of the types of a type hint to which it converts; unchanged if there is none."""
    if value == [None] and type(None) in get_args(hint):  # `--names none` for a list
        return None
    for kind in _kinds(hint):
        if _is_of(converted := _as(kind, value), kind):
            return converted
    return value


def _as(kind: Any, value: Any) -> Any:
    if get_origin(kind) is list and isinstance(value, list | tuple):
        return [_as(get_args(kind)[0], each) for each in value]
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    return value


def _fits(value: Any, hint: Any) -> bool:
    if value is None:
        return type(None) in get_args(hint)
    return any(_is_of(value, kind) for kind in _kinds(hint))


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(each, get_args(kind)[0]) for each in value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _describe(hint: Any) -> str:
    described = []
    for kind in _kinds(hint):
        if get_origin(kind) is Literal:
            described.append(f"one of {', '.join(map(repr, get_args(kind)))}")
        elif get_origin(kind) is list:
            described.append(f"a list, each entry {_WORDS[get_args(kind)[0]]}")
        else:
            described.append(_WORDS[kind])
    return " or ".join([*described, *(["None"] if type(None) in get_args(hint) else [])])
