"""The user's callbacks in a search: each trial gets copies of its own."""

import copy
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from ...training.trainer_callbacks import fault_of_callbacks


def copy_callbacks(callbacks: Sequence[TrainerCallback]) -> Sequence[TrainerCallback]:
    """Return deep copies, so that the state of a callback does not pass from one trial to the next."""
    return copy.deepcopy(callbacks)


def fault_of_copies(callbacks: Any) -> str | None:
    """Return a message that says why `callbacks` cannot be used in a search, or None if they can."""
    if fault := fault_of_callbacks(callbacks):
        return fault
    for callback in callbacks:
        try:
            copy_callbacks([callback])
        except Exception as error:  # raised by the callback's class, or by what it holds
            name = type(callback).__name__
            return (
                f"`callbacks` contains a {name}, but each trial needs its own copy, and copying it raised {error!r}. "
                f"Give {name} a `__deepcopy__` method, or let a function as `space` return new `callbacks` for each "
                "trial."
            )
    return None
