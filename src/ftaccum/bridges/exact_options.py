"""The options of `exact` and `ExactAccumulation`, and their rules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import refuse
from ..fields import Rule, is_positive_int, one_of
from ..objective.item_counts import CountItems

_FLAG = Rule(lambda value: isinstance(value, bool), "True or False")
_FUNCTION = Rule(lambda value: callable(value) and not isinstance(value, type), "a function").or_none()
_AUDIT = Rule(lambda value: isinstance(value, bool) or is_positive_int(value), "True, False or a positive integer")
_RULES = {
    "planner": (_FLAG, "True cuts each window again, into micro-batches with less padding."),
    "loss_fn": (_FUNCTION, "It is called as `loss_fn(outputs, batch)`."),
    "reduction": (one_of("mean", "sum"), "Say whether the loss is a mean or a sum over its items."),
    "count_items": (_FUNCTION, "It returns the number of loss items of a batch."),
    "on_inexact": (one_of("error", "warn", "ignore"), "Say what to do if the loss cannot be accumulated exactly."),
    "audit": (_AUDIT, "A number is that of updates from one audit to the next."),
}


def faults_of_options(given: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each option that is invalid.

    Args:
        given: values of options, by name.
    """
    faults = [rule.fault(name, given[name], remedy) for name, (rule, remedy) in _RULES.items() if name in given]
    return [fault for fault in faults if fault is not None]


@dataclass(frozen=True)
class ExactOptions:
    """The options of `exact`, which documents them.

    Raises:
        SettingsError: if an option has a wrong value.
    """

    planner: bool = False
    count_items: CountItems | None = None
    on_inexact: str = "warn"
    audit: bool | int = True

    def __post_init__(self) -> None:
        refuse(faults_of_options(vars(self)))
