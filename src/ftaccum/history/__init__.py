"""The ledger of a run, one entry a window and one an epoch, and the Result as a view of it."""

from .ledger import EpochEntry, Ledger, WindowEntry
from .result import Result
from .work import Work

__all__ = ["EpochEntry", "Ledger", "Result", "WindowEntry", "Work"]
