"""Running out of memory: detecting it, reporting it between processes, and adapting the micro-batches."""

import gc
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from typing import Any, TypeVar

import torch

from ..planning.micro_batches import BatchLimits
from .host import free_per_process

T = TypeVar("T")

# Windows without a failure before larger micro-batches are tried again; doubled each time that this fails.
_CALM = 50
# Texts in out-of-memory errors that are not a `torch.OutOfMemoryError`: from hosts, and from cuBLAS and cuDNN, which
# allocate memory themselves.
_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


class WindowOutOfMemoryError(Exception):
    """Memory ran out on some process, and all processes have abandoned the window.

    Attributes:
        failed: the pass of this process that ran out of memory; None if another process ran out.
    """

    def __init__(self, failed: "FailedPass | None") -> None:
        super().__init__(failed)
        self.failed = failed


class AgreedOutOfMemoryError(torch.OutOfMemoryError):
    """Memory ran out in what cannot be split. All processes raise this after the same update."""


@dataclass(frozen=True)
class FailedPass:
    """A pass that ran out of memory: its index among this process's micro-batches, and the error message."""

    index: int
    message: str


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out, so that a smaller micro-batch may help."""
    is_named = isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
    return isinstance(error, torch.OutOfMemoryError) or is_named


def none_if_out_of_memory(function: Callable[[], T]) -> T | None:
    """Return the result of a function, or None if memory runs out in it."""
    try:
        return function()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def free_memory(device: torch.device) -> int:
    """Return the free bytes that this process may use: of its device or, on a CPU, its share of the machine's.

    Those of a device include the bytes that torch keeps for reuse.
    """
    if device.type == "cpu":
        return free_per_process()
    reused = torch.accelerator.memory_reserved() - torch.accelerator.memory_allocated()
    return torch.accelerator.get_memory_info()[0] + reused


def give_back_memory() -> None:
    """Return unused memory from the allocator to the device, once the objects that held it are deleted."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.get_device_module().empty_cache()


@dataclass
class MemoryLimits:
    """The limits on the size of a micro-batch, adapted after micro-batches that did not fit in memory.

    Attributes:
        requested: the limits from the settings.
        current: the limits to cut windows by.
        failures: number of windows that had to be run again.
    """

    requested: BatchLimits
    current: BatchLimits = field(init=False)
    failures: int = 0
    _failed: int = 0  # tokens that did not fit under the requested limits
    _patience: int = field(default_factory=lambda: _CALM)
    _calm: int = 0
    _grew: bool = False

    def __post_init__(self) -> None:
        self.current = self.requested

    def state_dict(self) -> dict[str, Any]:
        learnt = {name: value for name, value in vars(self).items() if name not in ("requested", "current")}
        return learnt | {"requested": astuple(self.requested), "current": astuple(self.current)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of failures, and the adapted limits if the requested ones are the same."""
        if tuple(state_dict["requested"]) == astuple(self.requested):
            vars(self).update(
                state_dict | {"requested": self.requested, "current": BatchLimits(*state_dict["current"])}
            )
        self.failures = state_dict["failures"]

    def record_failure(self, tokens: int) -> None:
        """Record that a micro-batch of `tokens` tokens did not fit, and limit the next ones to half as many."""
        self._failed = tokens if self.current == self.requested else self._failed
        self._patience *= 2 if self._grew else 1
        self._calm, self._grew = 0, False
        self.current = self.current.of_tokens(tokens // 2)
        self.failures += 1

    def record_success(self) -> None:
        """Record that a window fitted. After enough of them, double the limit, up to the requested one."""
        self._calm += 1
        if self._calm < self._patience:
            return
        self._calm, self._grew = 0, False
        if self.current != self.requested and self.current.tokens is not None:
            twice = 2 * self.current.tokens
            self._grew = True
            self.current = self.requested if twice >= self._failed else self.requested.of_tokens(twice)
