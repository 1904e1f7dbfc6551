"""The search: accumulation steps × learning rate at a fixed physical batch."""

from .searching import search
from .space import read_dimensions
from .tables import best_trial

__all__ = ["best_trial", "read_dimensions", "search"]
