"""What a run has recorded, in memory or in its folder."""

from dataclasses import dataclass, field

from .ledger import Ledger
from .run_record import RunRecord


@dataclass(frozen=True)
class Recorded:
    """What a run has recorded.

    Attributes:
        ledger: its ledger; empty if there is none.
        record: its record, if there is one.
    """

    ledger: Ledger = field(default_factory=Ledger)
    record: RunRecord | None = None
