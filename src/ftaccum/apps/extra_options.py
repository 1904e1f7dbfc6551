"""The options that a training script declares itself: the fields of a dataclass."""

from collections.abc import Collection
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import SettingsError, refuse, shown
from ..fields import rules_of

_WORDS = {bool: "True or False", int: "an integer", float: "a number", str: "a text", Path: "a path"}


def check_extra_options(extra: type, taken: Collection[str]) -> None:
    """Check the declaration of a script's extra options.

    Args:
        extra: a dataclass.
        taken: the names of the other options of the script.

    Raises:
        SettingsError: if it is no dataclass; and for fields without a default, with a name that is taken, or of a type
            that the command line cannot give.
    """
    if not (isinstance(extra, type) and is_dataclass(extra)):
        refuse([f"`extra` must be a dataclass, but is {shown(extra)} instead. Decorate it with `@dataclass`."])
    hints = get_type_hints(extra)
    plain = plain_fields(extra)
    refuse([fault for f in fields(extra) for fault in _faults_of_field(f, hints[f.name], taken, f in plain)])


def read_extra_options(parsed: Any) -> list[str]:
    """Convert the values of a script's extra options to their types, and return a sentence for each that has another.

    A YAML file may have given a value of any type.
    """
    hints = get_type_hints(type(parsed))
    faults = []
    for f in plain_fields(type(parsed)):
        value, hint = getattr(parsed, f.name), hints[f.name]
        if type(value) is int and float in _kinds(hint) and int not in _kinds(hint):
            value = float(value)
            object.__setattr__(parsed, f.name, value)  # the dataclass may be frozen
        if value is not f.default and not _fits(value, hint):
            faults.append(f"`{f.name}` must be {_describe(hint)}, but is {shown(value)} instead.")
    return faults


def make_extra_options(extra: type, parsed: Any) -> Any:
    """Return an instance of the dataclass of a script, with the values of an instance of another one.

    Raises:
        SettingsError: if its `__post_init__` raises ValueError.
    """
    try:
        return extra(**{f.name: getattr(parsed, f.name) for f in fields(extra)})
    except ValueError as error:
        raise SettingsError([str(error)]) from error


def plain_fields(extra: type) -> list[Field]:
    """Return the fields that the script declares, without those of ftaccum, which have rules or conversions."""
    ruled = rules_of(extra)
    return [f for f in fields(extra) if f.name not in ruled and "traits" not in f.metadata]


def _faults_of_field(declared: Field, hint: Any, taken: Collection[str], is_plain: bool) -> list[str]:
    faults = []
    if declared.name in taken:
        faults.append(f"`extra` has the field {declared.name!r}, which is another option of the script. Rename it.")
    if declared.default is MISSING and declared.default_factory is MISSING:
        faults.append(f"`extra` has the field {declared.name!r} without a default. Give it one.")
    kinds = _kinds(hint)
    if is_plain and (not all(_is_supported(kind) for kind in kinds) or (len(kinds) > 1 and str not in kinds)):
        faults.append(
            f"`extra` has the field {declared.name!r} of a type that no option can have. Use bool, int, float, str, "
            "Path, Literal or a list of one of them, and `| None`."
        )
    return faults


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


def _fits(value: Any, hint: Any) -> bool:
    if value is None:
        return type(None) in get_args(hint)
    return any(_is_of(value, kind) for kind in _kinds(hint))


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(each, get_args(kind)[0]) for each in value)
    if kind is float:
        return type(value) in (int, float)
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
