"""Running out of memory: telling it, agreeing on it, and what is learnt from it."""

import gc
from dataclasses import astuple, dataclass, field
from typing import Any

import torch

from ..planning.micro_batches import BatchLimits

# Windows without a failure after which larger micro-batches are tried again; doubled each time that this fails.
_CALM = 50
# What devices and hosts say beside `torch.OutOfMemoryError`; cuBLAS and cuDNN allocate for themselves.
_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


class WindowOutOfMemoryError(Exception):
    """Memory ran out on some process, and all of them have left the window.

    Attributes:
        failed: which of this process's passes ran out, and what the device said; None where it was another process.
    """

    def __init__(self, failed: "FailedPass | None") -> None:
        super().__init__(failed)
        self.failed = failed


class AgreedOutOfMemoryError(torch.OutOfMemoryError):
    """Memory ran out for a single row, and all processes raise it, after the same update."""


@dataclass(frozen=True)
class FailedPass:
    """A pass of a window, by its place among this process's micro-batches, that memory ran out in."""

    index: int
    message: str


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller micro-batch may help."""
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
    return isinstance(error, torch.OutOfMemoryError) or told


def give_back_memory() -> None:
    """Hands the allocator's unused memory back to the device, after what held it is gone."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.get_device_module().empty_cache()


@dataclass
class MemoryLimits:
    """How large micro-batches may be, learnt from those that did not fit.

    Attributes:
        requested: the limits of the settings.
        current: the limits to cut by.
        failures: windows that had to be run again.
    """

    requested: BatchLimits
    current: BatchLimits = field(init=False)
    failures: int = 0
    _failed: int = 0  # tokens that did not fit, when everything wanted was tried
    _patience: int = field(default_factory=lambda: _CALM)
    _calm: int = 0
    _grew: bool = False

    def __post_init__(self) -> None:
        self.current = self.requested

    def state_dict(self) -> dict[str, Any]:
        learnt = {name: value for name, value in vars(self).items() if name not in ("requested", "current")}
        return learnt | {"requested": astuple(self.requested), "current": astuple(self.current)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What was learnt, if it was learnt of the same limits; how often memory ran out in any case."""
        if tuple(state_dict["requested"]) == astuple(self.requested):
            vars(self).update(
                state_dict | {"requested": self.requested, "current": BatchLimits(*state_dict["current"])}
            )
        self.failures = state_dict["failures"]

    def ran_out(self, tokens: int) -> None:
        """A micro-batch of as many tokens did not fit: half as many are the most from now on."""
        self._failed = tokens if self.current == self.requested else self._failed
        self._patience *= 2 if self._grew else 1
        self._calm, self._grew = 0, False
        self.current = self.current.of_tokens(tokens // 2)
        self.failures += 1

    def went_well(self) -> None:
        """A window fitted. After enough of them, micro-batches may be twice as large again, up to what was wanted."""
        self._calm += 1
        if self._calm < self._patience:
            return
        self._calm, self._grew = 0, False
        if self.current != self.requested and self.current.tokens is not None:
            twice = 2 * self.current.tokens
            self._grew = True
            self.current = self.requested if twice >= self._failed else self.requested.of_tokens(twice)
