"""The plan: rows → epochs → windows. Pure integers.

An epoch is a seeded permutation of the training rows. A window is the next so many of them, and makes one update. Only
then is the window cut into micro-batches and dealt to the processes (`cutting`), so that which rows make up an update
does not depend on how it is computed.
"""

from .arguments import PlanArguments, plan
from .batching import Batching, batching_of, rate_factor, resolve_batching
from .drawing import hold_out
from .windows import Plan, Window

__all__ = [
    "Batching",
    "Plan",
    "PlanArguments",
    "Window",
    "batching_of",
    "hold_out",
    "plan",
    "rate_factor",
    "resolve_batching",
]
