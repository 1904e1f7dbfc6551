"""The rules of the settings of the optimizer, its parameter groups and its schedule."""

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from ..fields import Rule, is_number

OPTIMIZERS = (
    "adamw", "sgd", "adafactor", "lion", "muon", "adamw_8bit", "paged_adamw_8bit", "schedule_free_adamw",
)  # fmt: skip
OPTIMIZER_NAMES = f"{', '.join(OPTIMIZERS[:-1])} or {OPTIMIZERS[-1]}"
# Names of the Trainer and of classes whose spelling is nearer to that of another optimizer here.
_OTHER_NAMES = {
    **dict.fromkeys(("adam", "adamw_hf", "adamw_torch", "adamw_torch_fused", "adamw_apex_fused"), "adamw"),
    **dict.fromkeys(("adamw_bnb_8bit", "adam8bit", "adamw8bit"), "adamw_8bit"),
    **dict.fromkeys(("pagedadamw8bit", "paged_adamw"), "paged_adamw_8bit"),
    **dict.fromkeys(("lion_32bit", "lion_pytorch"), "lion"),
    **dict.fromkeys(("schedulefree", "schedule_free", "adamwschedulefree"), "schedule_free_adamw"),
}
_GROUP_OPTIONS = ("lr", "weight_decay")


@dataclass(frozen=True)
class ExplainedRule(Rule):
    """A rule that also says what is wrong with a value.

    Attributes:
        explain: returns a sentence about a value that is not allowed; empty if there is nothing to add.
    """

    explain: Callable[[Any], str] = lambda _: ""

    def fault(self, name: str, value: Any, remedy: str) -> str | None:
        return super().fault(name, value, f"{self.explain(value)} {remedy}".strip())


def _read_name(value: Any) -> Any:
    """Return the name of an optimizer, or None for an object: a run keeps optimizers and functions elsewhere."""
    return value if isinstance(value, str) else None


def _similar_name(value: Any) -> str:
    word = str(value).lower().replace("-", "_")
    similar = [_OTHER_NAMES[word]] if word in _OTHER_NAMES else difflib.get_close_matches(word, OPTIMIZERS, 1)
    return f"Did you mean {similar[0]!r}?" if similar else ""


def _read_json(value: Any) -> Any:
    """Parse JSON text, and return text of another form and any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _read_groups(value: Any) -> Any:
    """Return a dict of options by pattern as a list of groups, and any other value unchanged, after parsing JSON."""
    value = _read_json(value)
    if not isinstance(value, Mapping) or not all(isinstance(options, Mapping) for options in value.values()):
        return value
    return [{"pattern": pattern, **options} for pattern, options in value.items()]


def _fault_of_groups(value: Any) -> str:
    """Return a sentence on the first group that cannot be used; empty if all can."""
    if isinstance(value, str):
        return "This is not JSON text."
    if not isinstance(value, list | tuple):
        return ""
    faults = (_fault_of_group(number, group) for number, group in enumerate(value, start=1))
    return next((fault for fault in faults if fault), "")


def _fault_of_group(number: int, group: Any) -> str:
    if not isinstance(group, Mapping):
        return f"Group {number} is no dict."
    if unknown := [key for key in group if key not in ("pattern", *_GROUP_OPTIONS)]:
        return f"Group {number} has the unknown key {unknown[0]!r}; it may have 'pattern', 'lr' and 'weight_decay'."
    pattern = group.get("pattern")
    if not isinstance(pattern, str) or not pattern:
        return f"Group {number} needs a 'pattern', a regular expression for names of parameters."
    try:
        re.compile(pattern)
    except re.error as error:
        return f"The pattern {pattern!r} is no regular expression: {error}."
    if not any(key in group for key in _GROUP_OPTIONS):
        return f"The group of {pattern!r} sets neither 'lr' nor 'weight_decay'."
    if "lr" in group and not (is_number(group["lr"]) and group["lr"] > 0):
        return f"The 'lr' of {pattern!r} must be a positive number. To train none of its parameters, freeze them."
    if "weight_decay" in group and not (is_number(group["weight_decay"]) and group["weight_decay"] >= 0):
        return f"The 'weight_decay' of {pattern!r} must be a non-negative number."
    return ""


def _are_options(value: Any) -> bool:
    names = isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
    return names and all(isinstance(option, int | float | str | bool | None) for option in value.values())


OptimizerName = Annotated[
    str,
    ExplainedRule(
        lambda v: v in OPTIMIZERS,
        f"{', '.join(map(repr, OPTIMIZERS))}, a function of the parameter groups, a torch Optimizer",
        _read_name,
        _similar_name,
    ),
]
LayerDecay = Annotated[float, Rule(lambda v: is_number(v) and 0 < v <= 1, "a factor above 0 and up to 1, such as 0.9,")]
SchedulerOptions = Annotated[
    str,  # one command-line word
    ExplainedRule(
        _are_options,
        "a dict of options, or JSON text such as '{\"min_lr_rate\": 0.1}',",
        _read_json,
        lambda v: "This is not JSON text." if isinstance(v, str) else "",
    ),
]
OptimizerGroups = Annotated[
    str,  # one command-line word
    ExplainedRule(
        lambda v: isinstance(v, list | tuple) and bool(v) and not _fault_of_groups(v),
        "a list of groups, such as [{'pattern': 'embeddings', 'lr': 1e-5}], or a dict of options by pattern, in Python "
        "or as JSON text,",
        _read_groups,
        _fault_of_groups,
    ),
]
