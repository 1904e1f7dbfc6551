"""The options that `exact` and `ExactAccumulation` share, and their rules."""

from dataclasses import dataclass

from ..errors import refuse
from ..objective.item_counts import CountItems


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
        is_audit = isinstance(self.audit, int) and self.audit >= 0
        rules = {
            "planner": (isinstance(self.planner, bool), "True or False"),
            "count_items": (self.count_items is None or callable(self.count_items), "a function or None"),
            "on_inexact": (self.on_inexact in ("warn", "error", "ignore"), "'warn', 'error' or 'ignore'"),
            "audit": (is_audit, "True, False or a positive integer"),
        }
        refuse(
            [
                f"`{name}` must be {allowed}, but is {getattr(self, name)!r} instead."
                for name, (is_right, allowed) in rules.items()
                if not is_right
            ]
        )
