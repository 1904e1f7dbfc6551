"""Make a process look like the only one to code that asks the launcher, Accelerate or torch."""

import os
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from torch import distributed

_SINGLE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


@contextmanager
def single_process(num_processes: int) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Yield a context manager in which the main process seems to be the only one. All processes call this.

    A stream may split its rows among the processes by rank. If only the main process reads it, the rows of the others
    would be lost. So the stream must see a single process.
    """
    if num_processes == 1:
        yield nullcontext
        return
    main_alone = distributed.new_group([0], backend="gloo")
    try:
        yield lambda: _seem_single(main_alone)
    finally:
        distributed.destroy_process_group(main_alone)


@contextmanager
def _seem_single(group: Any) -> Iterator[None]:
    world = distributed.group.WORLD
    with ExitStack() as stack:
        stack.enter_context(_overlay(os.environ, _SINGLE))
        for state in (PartialState, AcceleratorState):
            stack.enter_context(_overlay(state._shared_state, {"num_processes": 1}))
        distributed.group.WORLD = group
        try:
            yield
        finally:
            distributed.group.WORLD = world


@contextmanager
def _overlay(mapping: MutableMapping[str, Any], values: dict[str, Any]) -> Iterator[None]:
    before = {name: mapping[name] for name in values if name in mapping}
    mapping.update(values)
    try:
        yield
    finally:
        for name in values.keys() - before.keys():
            del mapping[name]
        mapping.update(before)
