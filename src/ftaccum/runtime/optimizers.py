"""Optimizers that hold other optimizers: those that they hold, and one set of parameter groups for all of them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer


def inner_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizers that an optimizer holds (in attributes, or in lists and dicts there), at any depth."""
    found: list[Optimizer] = []
    waiting: list[Any] = [*vars(optimizer).values()]
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, Optimizer) and value is not optimizer and value not in found:
            found.append(value)
            waiting += vars(value).values()
        elif isinstance(value, list | tuple):
            waiting += [each for each in value if isinstance(each, Optimizer)]
        elif isinstance(value, Mapping):
            waiting += [each for each in value.values() if isinstance(each, Optimizer)]
    return found


@contextmanager
def keep_groups(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Keep the parameter groups the same objects while states are loaded.

    `load_state_dict` makes new groups. An optimizer and those that it holds share theirs: afterwards a schedule would
    write its rates where no step reads them.
    """
    before = [(optimizer, list(optimizer.param_groups)) for optimizer in optimizers]
    yield
    for optimizer, groups in before:
        for group, loaded in zip(groups, optimizer.param_groups, strict=True):
            if group is not loaded:
                values = dict(loaded)
                group.clear()
                group.update(values)
        optimizer.param_groups[:] = groups
