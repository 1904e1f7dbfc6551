"""Tiny models of every head in Transformers' auto classes, whose accumulated gradient is compared with one batch.

`tiny` makes a small configuration of any class, `rows` draws rows, `tasks` lists the classes and rows of each task, and
`checking` checks one class. ftaccum does not know these models.
"""

from .checking import KINDS, Kind, Verdict, check
from .tasks import TASKS, Case, cases

__all__ = ["KINDS", "TASKS", "Case", "Kind", "Verdict", "cases", "check"]
