"""Every head that Transformers' auto classes know, built tiny, and its accumulated gradient held against one batch.

`tiny` makes a small configuration of any, `rows` draws rows, `tasks` says which classes and which rows a task has,
`checking` comes to a verdict on one of them. Nothing in here is known to ftaccum.
"""

from .checking import KINDS, Kind, Verdict, check
from .tasks import TASKS, Case, cases

__all__ = ["KINDS", "TASKS", "Case", "Kind", "Verdict", "cases", "check"]
