"""What a setting may be: rules in annotations, the sentence for a value that breaks one, values read as meant."""

import itertools
import math
import numbers
import os
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class Rule:
    """What a setting may be: a test, and the words for it in "must be …"."""

    accepts: Callable[[Any], bool]
    words: str
    read: Callable[[Any], Any] = lambda value: value  # from how it may be written to what is meant

    def fault(self, name: str, value: Any, remedy: str) -> str | None:
        """The sentence that says how `value` breaks this rule, or None where it does not."""
        try:
            if self.accepts(value):
                return None
        except Exception:  # users' objects may raise when they are compared, or asked whether they are true
            pass
        return f"`{name}` must be {self.words}, but is {shown(value)} instead. {remedy}"

    def or_none(self) -> "Rule":
        return Rule(lambda value: value is None or self.accepts(value), f"{self.words} or None", self.read)


class _Shown(reprlib.Repr):
    """Values in messages: cut in the middle where they are long, and named where they cannot be shown."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200
        self.maxlist = self.maxtuple = 20

    def repr_int(self, x: int, level: int) -> str:  # noqa: ARG002
        return repr(x) if abs(x) <= _LARGEST else "too large an integer"


_LARGEST = 2**63 - 1  # what NumPy and torch can count to
shown = _Shown().repr


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


PositiveInt = Annotated[int, Rule(lambda v: _is_int(v) and v > 0, "a positive integer")]
Count = Annotated[int, Rule(lambda v: _is_int(v) and v >= 0, "a non-negative integer")]
# torch seeds with 64 bits and NumPy with 32; the smaller bound serves both.
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
Precision = Annotated[str, Rule(lambda v: v in PRECISIONS, "'no', 'bf16' or 'fp16'")]
Pairs = Sequence[Sequence[int]]
Remainder = Annotated[str, Rule(lambda v: v in ("flush", "carry"), "'flush' or 'carry'")]
SCALINGS = ("none", "sqrt", "linear")
Scaling = Annotated[str, Rule(lambda v: v in SCALINGS, "'none', 'sqrt' or 'linear'")]
BatchSize = Annotated[int | str, Rule(lambda v: v == "auto" or (_is_int(v) and v > 0), "a positive integer or 'auto'")]
OnNonfinite = Annotated[str, Rule(lambda v: v in ("skip", "error"), "'skip' or 'error'")]
OnInexact = Annotated[str, Rule(lambda v: v in ("error", "warn", "ignore"), "'error', 'warn' or 'ignore'")]


def _is_schedule(value: Any) -> bool:
    pairs = isinstance(value, list | tuple) and all(isinstance(p, list | tuple) and len(p) == 2 for p in value)
    if not (value and pairs and all(_is_int(u) and _is_int(k) and k > 0 for u, k in value)):
        return False
    updates = [u for u, _ in value]
    return updates[0] == 0 and all(one < next_ for one, next_ in itertools.pairwise(updates))


def _steps_read(value: Any) -> Any:
    """Text such as '0:2,100:8' as pairs, where it can be; all else as it is."""
    if not isinstance(value, str) or ":" not in value:
        return value
    try:
        return [[int(update), int(k)] for update, k in (pair.split(":") for pair in value.split(","))]
    except ValueError:
        return value


Steps = Annotated[
    int | str | Pairs,
    Rule(
        lambda v: (_is_int(v) and v > 0) or _is_schedule(v),
        "a positive integer, or pairs (from_update, k) with the first from update 0, ascending, and every k positive, "
        "such as '0:2,100:8'",
        _steps_read,
    ),
]
_SECONDS = {"s": 1, "min": 60, "h": 3600}


def seconds_of(text: str) -> float | None:
    """A time such as '90s', '15min' or '1.5h' in seconds; None where it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(s|min|h)", text)
    return float(found[1]) * _SECONDS[found[2]] or None if found else None


Every = Annotated[
    int | str,
    Rule(
        lambda v: (_is_int(v) and v > 0) or (isinstance(v, str) and seconds_of(v) is not None),
        "a positive number of updates, or a time such as '90s', '15min' or '2h'",
    ),
]
Names = Annotated[
    str,  # as words of a command line come: a list's would have to be read one by one
    Rule(
        lambda v: isinstance(v, list | tuple) and all(isinstance(name, str) and name for name in v),
        "a list of names, such as ['learning_rate'], or 'learning_rate,n_epochs'",
        lambda v: [name.strip() for name in v.split(",") if name.strip()] if isinstance(v, str) else v,
    ),
]


def _resume_read(value: Any) -> Any:
    """`off` and `auto` in the words of other tools and of YAML."""
    if isinstance(value, str | bool):
        word = str(value).lower()
        return {"off": None, "false": None, "no": None, "auto": "auto", "true": "auto", "on": "auto"}.get(word, value)
    return value


Resume = Annotated[
    str,
    Rule(
        lambda v: isinstance(v, str) and bool(v),
        "'auto', the folder of a checkpoint or of a run,",
        _resume_read,
    ),
]
Costs = Annotated[
    list[float],
    Rule(
        lambda v: (
            isinstance(v, list | tuple) and len(v) == 3 and all(_is_number(c) and 0 <= c < 1e30 for c in v) and any(v)
        ),
        "three numbers of 0 or more (and below 1e30), one at least above 0, such as [64, 1, 0.0005]",
    ),
]


def setting(default: Any, help: str, *aliases: str) -> Any:
    # The metadata is what `HfArgumentParser` hands to argparse, so that a field is a flag with its help.
    return field(default=default, metadata={"help": help, "aliases": list(aliases)})


def read_settings(kind: type[T], given: Mapping[str, Any]) -> T:
    """One of the dataclasses of settings from those of its fields that are given, each read as its rule says."""
    rules = rules_of(kind)
    names = [name for name in kind.__dataclass_fields__ if name in given]  # type: ignore[attr-defined]
    return kind(**{n: rules[n].read(plain(given[n])) for n in names})


def plain(value: Any) -> Any:
    """NumPy's numbers as Python's, paths as strings; what cannot be read so stays as it is, for its rule to refuse."""
    try:
        return _plain(value)
    except Exception:  # a list that holds itself, a fraction beyond all floats, a tensor without storage, …
        return value


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if hasattr(value, "tolist"):  # an array of NumPy's
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def find_faults(settings: Any) -> list[str]:
    """A sentence for each field of a settings dataclass that breaks the rule in its annotation."""
    rules = rules_of(type(settings))
    found = (
        rules[f.name].fault(f.name, getattr(settings, f.name), _remedy(f)) for f in fields(settings) if f.name in rules
    )
    return [fault for fault in found if fault]


def rules_of(kind: type) -> dict[str, Rule]:
    """The rules of a dataclass, by the names of those of its fields that have one."""
    found = {name: _rule(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}
    return {name: rule for name, rule in found.items() if rule is not None}


def _rule(hint: Any) -> Rule | None:
    if get_origin(hint) is Annotated:
        return next(note for note in get_args(hint) if isinstance(note, Rule))
    rules = [_rule(each) for each in get_args(hint) if get_origin(each) is Annotated]
    return rules[0].or_none() if rules and rules[0] else None


def _remedy(f: Field) -> str:
    return f"It means: {f.metadata['help']}; the default is {f.default!r}."
