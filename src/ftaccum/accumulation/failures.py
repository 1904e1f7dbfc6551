"""Failures in a window with which all processes leave it together."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import DataError, SettingsError
from ..runtime.lazy.value import LazyError
from ..runtime.memory import FailedPass, WindowOutOfMemoryError, is_out_of_memory
from ..runtime.process_group import ProcessGroup

Failure = DataError | WindowOutOfMemoryError | LazyError


def refuse_unfrozen(model: nn.Module, trained: Iterable[Tensor]) -> None:
    """Refuse weights that have been unfrozen: DDP would not sync their gradients, and FSDP2 would drop them.

    Args:
        trained: the weights that were trained at the start of the run.
    """
    known = set(trained)
    names = [name for name, p in model.named_parameters() if p.requires_grad and p not in known]
    if names:
        raise SettingsError(
            [
                f"The weight `{names[0].removeprefix('module.')}` was frozen at the start of the run and is not any "
                "more. With several processes, weights can be frozen during a run, but not unfrozen. Leave it "
                "trainable with a learning rate of 0, or start a new run after unfreezing it."
            ]
        )


def failure_of(index: int, error: Exception) -> Failure | None:
    """Return the failure that all processes raise after an error in this one; None if this one raises it alone.

    Args:
        index: the position of the pass in the window.
    """
    if isinstance(error, DataError | LazyError):
        return error
    return WindowOutOfMemoryError(FailedPass(index, str(error))) if is_out_of_memory(error) else None


def leave_after(failure: Failure | None, process_group: ProcessGroup) -> None:
    """Raise an error on all processes if any of them has a failure: its DataError, a LazyError, or an out-of-memory
    error."""
    if not process_group.any(failure is not None):
        return
    process_group.run_on_all(lambda: _raise_data_error(failure))
    if process_group.any(isinstance(failure, LazyError)):
        raise failure if isinstance(failure, LazyError) else LazyError("a pass of another process failed")
    raise failure or WindowOutOfMemoryError(None)


@contextmanager
def synced_pass() -> Iterator[None]:
    """Extend an out-of-memory error with a remedy, in a pass where processes wait for each other."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(
            "Memory ran out in a pass in which gradients are synced or weights are gathered. The other processes are "
            "in the middle of this pass, so the run cannot continue. Lower `batch_size` or `max_tokens`, which leaves "
            f"the effective batch unchanged, or set `gradient_checkpointing`. The device reported: {error}"
        ) from error


def _raise_data_error(failure: Failure | None) -> None:
    if isinstance(failure, DataError):
        raise failure
