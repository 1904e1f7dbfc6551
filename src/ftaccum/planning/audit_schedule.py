"""Decide which updates to audit, from integers and seconds alone, without torch."""

from dataclasses import dataclass, field
from typing import Any

_FIRST = (1, 4, 16, 64)  # updates audited at any cost
_SHORT, _SHORTEST = 50, 16  # updates; a shorter run has two audits; an even shorter one, of a few micro-batches each
_SHARE, _SHARE_ORDINARY = 0.01, 0.005  # shares of the training time that later audits may take
# Micro-batches of an audit that does not take the whole window. An audit computes the gradient of its rows twice. In a
# run of 8 updates of 8 micro-batches, two audits of two micro-batches compute (2 + 2) × 2 / 64 = 12% of its passes
# again; with the whole window in the second audit, it would be (2 + 8) × 2 / 64 = 31%.
_PART, _PART_OF_SHORTEST = 4, 2
_EXTRA = 8  # audits of updates with new values at any cost


@dataclass
class AuditSchedule:
    """The decision, before each update, whether to audit it.

    With `audit=True`, updates 1, 4, 16 and 64 are audited, and later ones while audits have taken less than 0.5% of the
    training time. An update with label values or flags that no earlier update had takes the place of the next planned
    audit. After the planned audits, eight such updates are audited at any cost, and more while audits have taken less
    than 1% of the training time. A run of fewer than 50 updates has two planned audits, and these eight.

    Attributes:
        audit: the setting: True, False, or the number of updates from one audit to the next.
        n_updates: number of updates in the whole run.
        spent: seconds that audits have taken.
        trained: seconds of training, without audits.
        extra: how many more updates with new values are audited at any cost.
    """

    audit: bool | int
    n_updates: int
    spent: float = 0.0
    trained: float = 0.0
    extra: int = _EXTRA
    _ahead: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._ahead = [1, max(2, (self.n_updates + 1) // 2)] if self.is_short else list(_FIRST)

    @property
    def is_short(self) -> bool:
        """Whether the run has only two planned audits."""
        return self.n_updates < _SHORT

    @property
    def takes_parts(self) -> bool:
        """Whether audits of whole windows would take a large share of the time of the run."""
        return self.audit is True and self.n_updates < _SHORTEST

    @property
    def part(self) -> int:
        """The number of micro-batches of an audit that does not take the whole window."""
        return _PART_OF_SHORTEST if self.takes_parts else _PART

    def is_due(self, update: int) -> bool:
        """Return whether to audit an update, regardless of its rows.

        Args:
            update: number of the update, from 1.
        """
        if self.audit is True:
            return bool(self._ahead) and update >= self._ahead[0]
        return self.audit is not False and (update - 1) % self.audit == 0

    @property
    def takes_others(self) -> bool:
        """Whether updates that are not due may be audited."""
        return self.audit is True and (bool(self._ahead or self.extra) or not self.is_short)

    def may_take(self, *, is_new: bool) -> bool:
        """Return whether to audit an update that is not due.

        Args:
            is_new: whether the update has label values, flags or columns that no earlier update had.
        """
        if self.audit is not True:
            return False
        if is_new and (self._ahead or self.extra):
            return True
        share = _SHARE if is_new else _SHARE_ORDINARY
        return not (self._ahead or self.is_short) and self.spent < share * self.trained

    def done(self, seconds: float, *, is_new: bool) -> None:
        """Record an audit that took `seconds`."""
        self.spent += seconds
        if not self._ahead and is_new and self.extra:
            self.extra -= 1
        self._ahead = self._ahead[1:]

    def state_dict(self) -> dict[str, Any]:
        return {"spent": self.spent, "trained": self.trained, "ahead": self._ahead, "extra": self.extra}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.spent, self.trained = state_dict["spent"], state_dict["trained"]
        self._ahead, self.extra = state_dict["ahead"], state_dict["extra"]
