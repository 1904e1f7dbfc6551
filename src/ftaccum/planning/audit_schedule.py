"""Decide which updates to audit, from integers and seconds alone, without torch."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

_SHORT = 50  # updates; after its planned audits, a shorter run audits only updates with new values
_SHORTEST = 16  # updates; a shorter run has one planned audit
_PLANNED_SHARE = 0.0075  # the share of a run's passes that two or three planned audits of whole windows may repeat
_COST = 2.0  # windows: an audit of a whole window computes its gradient twice
_LATER = (4, 16, 64)  # the updates of these audits
_SHARE, _SHARE_ORDINARY = 0.01, 0.005  # shares of the training time that later audits may take
_EXTRA = 8  # audits of updates with new values at any cost
_CHANGES = 8  # audits at any cost of updates before which the state of the loss has changed


class AuditSize(Enum):
    """The rows of a window that an audit takes."""

    FEW_ROWS = "few rows"
    WHOLE_WINDOW = "whole window"


@dataclass
class AuditSchedule:
    """The decision, before each update, whether to audit it, and how much of its window.

    With `audit=True`, the first update is audited on a few rows, and one update in the middle of the run on all of its
    rows, unless the run has fewer than 16 updates. If 0.75% of the run's passes suffice for two or three such audits,
    these take updates 4, 16 and 64 instead. Later updates are audited while audits have taken less than 0.5% of the
    training time.

    Updates with label values or flags that no earlier update had are audited on a few rows: eight at any cost, and more
    while audits have taken less than 1% of the training time. The same holds for updates before which the state of the
    loss has changed, such as its class weights. These are audited as well if `audit` is a number.

    Attributes:
        audit: the setting: True, False, or the number of updates from one audit to the next.
        n_updates: number of updates in the whole run.
        spent: seconds that audits have taken.
        trained: seconds of training, without audits.
        extra: how many more updates with new values are audited at any cost.
        changes: how many more updates with a changed loss are audited at any cost.
    """

    audit: bool | int
    n_updates: int
    spent: float = 0.0
    trained: float = 0.0
    extra: int = _EXTRA
    changes: int = _CHANGES
    _planned: dict[int, AuditSize] = field(init=False)
    _ahead: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._planned = _plan_audits(self.n_updates)
        self._ahead = list(self._planned)

    @property
    def is_short(self) -> bool:
        """Whether only planned updates and those with new values are audited."""
        return self.n_updates < _SHORT

    def is_due(self, update: int) -> bool:
        """Return whether to audit an update, regardless of its rows.

        Args:
            update: number of the update, from 1.
        """
        if self.audit is True:
            return bool(self._ahead) and update >= self._ahead[0]
        return self.audit is not False and (update - 1) % self.audit == 0

    def size(self, update: int, *, is_new: bool) -> AuditSize:
        """Return the rows that the audit of an update takes.

        Args:
            is_new: whether the update has new values, or a changed loss.
        """
        if self.n_updates == 1:
            return AuditSize.WHOLE_WINDOW
        if self.is_due(update):
            if self.audit is not True:
                return AuditSize.FEW_ROWS if update == 1 else AuditSize.WHOLE_WINDOW
            return self._planned.get(self._ahead[0], AuditSize.WHOLE_WINDOW)
        return AuditSize.FEW_ROWS if is_new else AuditSize.WHOLE_WINDOW

    @property
    def takes_others(self) -> bool:
        """Whether updates that are not due may be audited for their rows."""
        return self.audit is True and (bool(self._ahead or self.extra) or not self.is_short)

    def may_take(self, *, is_new: bool, is_changed: bool = False, is_rare_change: bool = False) -> bool:
        """Return whether to audit an update that is not due.

        Args:
            is_new: whether the update has label values, flags or columns that no earlier update had.
            is_changed: whether the state of the loss has changed since the last audit.
            is_rare_change: whether it has changed at a place where it rarely changes.
        """
        if is_rare_change and self.changes and self.audit is not False:
            return True
        if self.audit is not True:
            return False
        if is_new and self.extra:
            return True
        share = _SHARE if is_new or is_changed else _SHARE_ORDINARY
        return not (self._ahead or self.is_short) and self.spent < share * self.trained

    def done(self, seconds: float, *, is_planned: bool, is_rare_change: bool = False) -> None:
        """Record an audit.

        Args:
            seconds: the time that it took.
            is_planned: whether the update was due, regardless of its rows.
            is_rare_change: whether the state of the loss had changed at a place where it rarely changes.
        """
        self.spent += seconds
        if is_planned:
            self._ahead = self._ahead[1:]
        elif is_rare_change:
            self.changes = max(0, self.changes - 1)
        else:
            self.extra = max(0, self.extra - 1)

    def state_dict(self) -> dict[str, Any]:
        numbers = {"spent": self.spent, "trained": self.trained, "extra": self.extra, "changes": self.changes}
        return {**numbers, "ahead": self._ahead}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.spent, self.trained = state_dict["spent"], state_dict["trained"]
        self._ahead, self.extra = state_dict["ahead"], state_dict["extra"]
        self.changes = state_dict.get("changes", _CHANGES)  # older checkpoints lack it


def _plan_audits(n_updates: int) -> dict[int, AuditSize]:
    """Return the planned audits of a run: the rows that each takes, by update."""
    n_whole = int(_PLANNED_SHARE * n_updates / _COST)
    if n_whole > 1:
        return {1: AuditSize.FEW_ROWS, **dict.fromkeys(_LATER[:n_whole], AuditSize.WHOLE_WINDOW)}
    middle = {(n_updates + 1) // 2: AuditSize.WHOLE_WINDOW} if n_updates >= _SHORTEST else {}
    return {1: AuditSize.FEW_ROWS, **middle}
