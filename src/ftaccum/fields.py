"""Declarations of settings: defaults, metadata, rules, and the message for a value that breaks its rule."""

import math
from collections.abc import Callable, Collection
from dataclasses import Field, dataclass, field, fields, make_dataclass, replace
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from .errors import LARGEST, shown

T = TypeVar("T")


class DefaultFloat(float):
    """A default value in a signature. Its type distinguishes it from an equal number that the user passes."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """The metadata of a setting besides its type, default and help.

    Attributes:
        group: heading under which help pages and the table of arguments list the setting.
        sizes_update: whether it determines the size of an update. A resumed run compares the resulting effective
            batch size instead of these settings.
        matters_to_rounding: whether it changes the order of sums, so that results differ by rounding.
        in_plan: whether `plan` accepts it.
        in_verify: whether `verify` accepts it.
        decided_by_search: whether `search` sets it in each trial instead of accepting it as an argument.
        unsearchable: why `search` cannot vary it; empty if it can.
    """

    group: str = ""
    sizes_update: bool = False
    matters_to_rounding: bool = False
    in_plan: bool = False
    in_verify: bool = False
    decided_by_search: bool = False
    unsearchable: str = ""


def setting(default: Any, help: str, *aliases: str, **traits: Any) -> Any:
    """Declare a field of a settings dataclass.

    Args:
        default: the default value; a list is copied for each instance.
        help: meaning of the setting, for help pages, error messages and the table of arguments.
        aliases: further command-line flags for the setting.
        **traits: the fields of `Traits`.
    """
    metadata = {"help": help, "aliases": list(aliases), "traits": Traits(**traits)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def traits_of(declared: Field) -> Traits:
    """Return the traits of a field, or default traits if the field was not declared with `setting`."""
    return declared.metadata.get("traits", Traits())


def names_where(kind: type, wanted: Callable[[Traits], bool]) -> tuple[str, ...]:
    """Return the names of the settings of a dataclass whose traits satisfy `wanted`."""
    return tuple(f.name for f in fields(kind) if wanted(traits_of(f)))


def select_settings(name: str, kind: type, wanted: Callable[[Traits], bool]) -> type:
    """Return a dataclass with the settings of `kind` whose traits satisfy `wanted`. It keeps their declarations."""
    return select_fields(name, kind, names_where(kind, wanted))


def select_fields(name: str, kind: type, names: Collection[str], optional: Collection[str] = ()) -> type:
    """Return a dataclass with some fields of `kind`. It keeps their declarations.

    Args:
        optional: names of fields that may be None, and are by default.
    """
    hints = get_type_hints(kind, include_extras=True)
    chosen = [
        (f.name, hints[f.name], field(default=f.default, default_factory=f.default_factory, metadata=f.metadata))
        for f in fields(kind)
        if f.name in names
    ] + [
        (f.name, hints[f.name] | None, field(default=None, metadata=f.metadata))
        for f in fields(kind)
        if f.name in optional
    ]
    return make_dataclass(name, chosen, frozen=True, kw_only=True)


@dataclass(frozen=True)
class Rule:
    """The rule for the values of a setting.

    Attributes:
        accepts: returns whether a value is allowed.
        words: description of the allowed values, which completes the sentence "must be …".
        read: parses other notations of a value, such as text, into the value.
    """

    accepts: Callable[[Any], bool]
    words: str
    read: Callable[[Any], Any] = lambda value: value

    def fault(self, name: str, value: Any, remedy: str) -> str | None:
        """Return a sentence on how `value` breaks this rule, or None if it does not."""
        try:
            if self.accepts(value):
                return None
        except Exception:  # users' objects may raise in comparisons or in `bool`
            pass
        return f"`{name}` must be {self.words}, but is {shown(value)} instead. {remedy}"

    def or_none(self) -> "Rule":
        return replace(self, accepts=lambda value: value is None or self.accepts(value), words=f"{self.words} or None")


def one_of(*choices: str) -> Rule:
    """Return a rule that accepts only these values."""
    *first, last = map(repr, choices)
    return Rule(lambda value: value in choices, f"{', '.join(first)} or {last}")


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST


def is_positive_int(value: Any) -> bool:
    return is_int(value) and value > 0


def is_number(value: Any) -> bool:
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


PositiveInt = Annotated[int, Rule(is_positive_int, "a positive integer")]
Count = Annotated[int, Rule(lambda v: is_int(v) and v >= 0, "a non-negative integer")]
# torch takes 64-bit seeds and NumPy 32-bit seeds; the smaller bound fits both.
Seed = Annotated[int, Rule(lambda v: is_int(v) and 0 <= v < 2**32, "an integer from 0 to 2**32 - 1")]
Positive = Annotated[float, Rule(lambda v: is_number(v) and v > 0, "a positive number")]
Length = Annotated[float, Rule(lambda v: is_number(v) and v >= 1, "a number of 1 or more")]
NonNegative = Annotated[float, Rule(lambda v: is_number(v) and v >= 0, "a non-negative number")]
Fraction = Annotated[float, Rule(lambda v: is_number(v) and 0 <= v < 1, "a number from 0 to below 1")]


def read_flag(value: Any) -> Any:
    """Parse a flag from text, and return any other value unchanged."""
    if not isinstance(value, str):
        return value
    flags = {**dict.fromkeys(("true", "yes", "on"), True), **dict.fromkeys(("false", "no", "off"), False)}
    return flags.get(value.lower(), value)


FlagOrFolder = Annotated[
    bool | str,
    Rule(lambda v: isinstance(v, bool) or (isinstance(v, str) and bool(v)), "True, False, or a folder", read_flag),
]
Flag = Annotated[bool, Rule(lambda v: isinstance(v, bool), "True or False")]
Text = Annotated[str, Rule(lambda v: isinstance(v, str) and bool(v) and "\0" not in v, "a non-empty string")]
Tracker = Annotated[
    str,
    Rule(
        lambda v: bool(v) and (isinstance(v, str | list | tuple) or hasattr(v, "store_init_configuration")),
        "the name of a tracker, an Accelerate GeneralTracker, or a list of them",
    ),
]
SCALINGS = ("none", "sqrt", "linear")
Scaling = Annotated[str, one_of(*SCALINGS)]
Precision = Annotated[str, one_of("no", "bf16", "fp16")]
Remainder = Annotated[str, one_of("flush", "carry")]
OnNonfinite = Annotated[str, one_of("skip", "error")]
OnInexact = Annotated[str, one_of("error", "warn", "ignore")]
Sampling = Annotated[str, one_of("shuffle", "balanced")]
Verbosity = Annotated[str, one_of("quiet", "normal", "debug")]
Save = Annotated[str, one_of("adapter", "merged", "both")]
Sharding = Annotated[str, one_of("fsdp2", "off")]
LossHead = Annotated[str, one_of("auto", "full")]
Sync = Annotated[str, one_of("each", "last")]
LossOver = Annotated[str, one_of("items", "window")]
Balance = Annotated[str, one_of("window", "micro_batch")]
_names = Rule(
    lambda v: isinstance(v, list | tuple) and all(isinstance(name, str) and name for name in v),
    "a list of names, such as ['learning_rate'], or 'learning_rate,n_epochs'",
    lambda v: [name.strip() for name in v.split(",") if name.strip()] if isinstance(v, str) else v,
)
Names = Annotated[str, _names]  # one command-line word: for a list, argparse would parse each element separately
TextNames = Annotated[
    str,
    Rule(
        lambda v: _names.accepts(v) and len(v) in (1, 2) and len(set(v)) == len(v),
        "the name of a column, such as 'review', or of two for pairs, such as ('premise', 'hypothesis'),",
        _names.read,
    ),
]


def _read_resume(value: Any) -> Any:
    """Convert synonyms of None and 'auto' from YAML and other tools, and return any other value unchanged."""
    if isinstance(value, str | bool):
        word = str(value).lower()
        return {"off": None, "false": None, "no": None, "auto": "auto", "true": "auto", "on": "auto"}.get(word, value)
    return value


Resume = Annotated[
    str,
    Rule(lambda v: isinstance(v, str) and bool(v), "'auto', the folder of a checkpoint or of a run,", _read_resume),
]


def rules_of(kind: type) -> dict[str, Rule]:
    """Return the rules of a dataclass by field name, without fields that have no rule."""
    found = {name: _rule(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}
    return {name: rule for name, rule in found.items() if rule is not None}


def _rule(hint: Any) -> Rule | None:
    if get_origin(hint) is Annotated:
        return next(note for note in get_args(hint) if isinstance(note, Rule))
    rules = [_rule(each) for each in get_args(hint) if get_origin(each) is Annotated]
    return rules[0].or_none() if rules and rules[0] else None
