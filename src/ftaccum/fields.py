"""Declarations of settings: defaults, metadata, rules, and the message for a value that breaks its rule."""

import itertools
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import Field, dataclass, field, fields, make_dataclass
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


def select_fields(name: str, kind: type, names: Collection[str]) -> type:
    """Return a dataclass with some fields of `kind`. It keeps their declarations."""
    hints = get_type_hints(kind, include_extras=True)
    chosen = [
        (f.name, hints[f.name], field(default=f.default, default_factory=f.default_factory, metadata=f.metadata))
        for f in fields(kind)
        if f.name in names
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
        return Rule(lambda value: value is None or self.accepts(value), f"{self.words} or None", self.read)


def one_of(*choices: str) -> Rule:
    """Return a rule that accepts only these values."""
    *first, last = map(repr, choices)
    return Rule(lambda value: value in choices, f"{', '.join(first)} or {last}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is_positive_int(value: Any) -> bool:
    return _is_int(value) and value > 0


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


PositiveInt = Annotated[int, Rule(_is_positive_int, "a positive integer")]
Count = Annotated[int, Rule(lambda v: _is_int(v) and v >= 0, "a non-negative integer")]
# torch takes 64-bit seeds and NumPy 32-bit seeds; the smaller bound fits both.
Seed = Annotated[int, Rule(lambda v: _is_int(v) and 0 <= v < 2**32, "an integer from 0 to 2**32 - 1")]
Positive = Annotated[float, Rule(lambda v: _is_number(v) and v > 0, "a positive number")]
Length = Annotated[float, Rule(lambda v: _is_number(v) and v >= 1, "a number of 1 or more")]
NonNegative = Annotated[float, Rule(lambda v: _is_number(v) and v >= 0, "a non-negative number")]
Fraction = Annotated[float, Rule(lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1")]
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
BatchSize = Annotated[int | str, Rule(lambda v: v == "auto" or _is_positive_int(v), "a positive integer or 'auto'")]
Pairs = Sequence[Sequence[int]]


def _is_schedule(value: Any) -> bool:
    pairs = isinstance(value, list | tuple) and all(isinstance(p, list | tuple) and len(p) == 2 for p in value)
    if not (value and pairs and all(_is_int(u) and _is_positive_int(k) for u, k in value)):
        return False
    updates = [u for u, _ in value]
    return updates[0] == 0 and all(one < next_ for one, next_ in itertools.pairwise(updates))


def _read_steps(value: Any) -> Any:
    """Parse text such as '0:2,100:8' into pairs, and return any other value unchanged."""
    if not isinstance(value, str) or ":" not in value:
        return value
    try:
        return [[int(update), int(k)] for update, k in (pair.split(":") for pair in value.split(","))]
    except ValueError:
        return value


Steps = Annotated[
    int | str | Pairs,
    Rule(
        lambda v: _is_positive_int(v) or _is_schedule(v),
        "a positive integer, or pairs (from_update, k) in ascending order, with the first from update 0 and every k "
        "positive, such as '0:2,100:8'",
        _read_steps,
    ),
]
_SECONDS = {"s": 1, "min": 60, "h": 3600}


def seconds_of(text: str) -> float | None:
    """Convert a time such as '90s', '15min' or '1.5h' to seconds; return None for other text."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(s|min|h)", text)
    return float(found[1]) * _SECONDS[found[2]] or None if found else None


Every = Annotated[
    int | str,
    Rule(
        lambda v: _is_positive_int(v) or (isinstance(v, str) and seconds_of(v) is not None),
        "a positive number of updates, or a time such as '90s', '15min' or '2h'",
    ),
]


def _read_share(value: Any) -> Any:
    """Convert text to a number of updates ("200") or a share ("25%", "0.25"), and return any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        if value.endswith("%"):
            return float(value[:-1]) / 100
        return int(value) if value.isdecimal() else float(value)
    except ValueError:
        return value


EvaluateEvery = Annotated[
    int | float | str,  # str on the command line; `_read_share` parses it
    Rule(
        lambda v: _is_positive_int(v) or (isinstance(v, float) and 0 < v <= 1),
        "a positive number of updates, or a share of an epoch above 0 and up to 1, such as 0.25 or '25%'",
        _read_share,
    ),
]


def _read_audit(value: Any) -> Any:
    """Parse a flag or a number from text, and return any other value unchanged."""
    if not isinstance(value, str):
        return value
    word = value.lower()
    return {"true": True, "false": False}.get(word, int(word) if word.isdecimal() else value)


Audit = Annotated[
    int | str,  # str on the command line; `_read_audit` parses it
    Rule(
        lambda v: isinstance(v, bool) or (_is_int(v) and v > 1),
        "True, False, or a number of updates that is at least 2",
        _read_audit,
    ),
]
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


def _read_weights(value: Any) -> Any:
    try:
        return [float(word) for word in value.split(",")]
    except (AttributeError, ValueError):  # not text, or not numbers
        return value


_weights = Rule(
    lambda v: v == "balanced" or (isinstance(v, list | tuple) and min(v) > 0 and all(map(_is_number, v))),
    "'balanced', or a list of one positive number per class, such as [1, 2.5] or '1,2.5',",
    _read_weights,
)
ClassWeights = Annotated[str, _weights]  # one command-line word, as for `Names`


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
Costs = Annotated[
    list[float],
    Rule(
        lambda v: (
            isinstance(v, list | tuple) and len(v) == 3 and all(_is_number(c) and 0 <= c < 1e30 for c in v) and any(v)
        ),
        "three non-negative numbers below 1e30, at least one of them above 0, such as [64, 1, 0.0005]",
    ),
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
