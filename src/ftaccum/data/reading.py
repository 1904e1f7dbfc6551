"""The user's stream, opened for a run."""

import os
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import distributed

from ..runtime.process_group import ProcessGroup
from .iterable import Stream, is_stream

_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


@contextmanager
def open_stream(data: Any, seed: int, accelerator: Accelerator, process_group: ProcessGroup) -> Iterator[Stream | None]:
    """Training data as a stream, where they are one. All processes call it alike."""
    if not is_stream(data):
        yield None
        return
    with _main_by_itself(accelerator) as alone:
        yield Stream(data, "train_data", seed, process_group.run_on_main, alone)


@contextmanager
def _main_by_itself(accelerator: Accelerator) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Gives a context in which the main process seems to be the only one.

    A stream may deal its rows to the processes by rank. Of one that only the main process reads, the others' rows would
    be lost, unless it finds no others.
    """
    if accelerator.num_processes == 1:
        yield nullcontext
        return
    itself = distributed.new_group([0], backend="gloo")
    try:
        yield lambda: _seeming_alone(itself)
    finally:
        distributed.destroy_process_group(itself)


@contextmanager
def _seeming_alone(group: Any) -> Iterator[None]:
    everyone = distributed.group.WORLD
    with ExitStack() as stack:
        stack.enter_context(_overlaid(os.environ, _ALONE))
        for state in (PartialState, AcceleratorState):
            stack.enter_context(_overlaid(state._shared_state, {"num_processes": 1}))
        distributed.group.WORLD = group
        try:
            yield
        finally:
            distributed.group.WORLD = everyone


@contextmanager
def _overlaid(mapping: MutableMapping[str, Any], values: dict[str, Any]) -> Iterator[None]:
    before = {name: mapping[name] for name in values if name in mapping}
    mapping.update(values)
    try:
        yield
    finally:
        for name in values.keys() - before.keys():
            del mapping[name]
        mapping.update(before)
