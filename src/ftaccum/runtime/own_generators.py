"""Random number generators that objects own, besides the global ones."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def preserve_own_generators(*owners: Any) -> Iterator[None]:
    """Restore the generators among the attributes of objects on exit."""
    values = [value for owner in owners for value in getattr(owner, "__dict__", {}).values()]
    restore = [function for value in values if (function := _restorer(value)) is not None]
    try:
        yield
    finally:
        for function in restore:
            function()


def _restorer(value: Any) -> Callable[[], Any] | None:
    """Return a function that restores the present state of a generator; None for another object."""
    if isinstance(value, torch.Generator):
        torch_state = value.get_state()
        return lambda: value.set_state(torch_state)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        bit_state = bits.state
        return lambda: setattr(bits, "state", bit_state)
    if isinstance(value, np.random.RandomState):
        numpy_state = value.get_state()
        return lambda: value.set_state(numpy_state)
    if isinstance(value, random.Random):
        python_state = value.getstate()
        return lambda: value.setstate(python_state)
    return None
