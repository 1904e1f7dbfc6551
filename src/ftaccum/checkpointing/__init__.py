"""Checkpoints: what makes a run go on as if it had never stopped."""

from .holding import held, is_held
from .keeping import Keeper
from .matching import facts_of
from .resuming import Resumption
from .shelf import Shelf
from .state import RunState, Stateful
from .writing import Writer

__all__ = ["Keeper", "Resumption", "RunState", "Shelf", "Stateful", "Writer", "facts_of", "held", "is_held"]
