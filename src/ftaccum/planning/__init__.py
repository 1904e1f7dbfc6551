"""The plan: rows → epochs → windows. Pure integers.

An epoch is a seeded permutation of the training rows, or what a stream gives. A window is the next so many rows, and
makes one update. Only then is the window cut into micro-batches and dealt to the processes (`cutting`), so that which
rows make up an update does not depend on how it is computed.
"""

from .arguments import PlanArguments, plan
from .batching import Batching, batching_of, rate_factor, resolve_batching
from .course import Course, Window
from .drawing import hold_out
from .streaming import StreamPlan
from .windows import Plan

__all__ = [
    "Batching",
    "Course",
    "Plan",
    "PlanArguments",
    "StreamPlan",
    "Window",
    "batching_of",
    "hold_out",
    "plan",
    "rate_factor",
    "resolve_batching",
]
