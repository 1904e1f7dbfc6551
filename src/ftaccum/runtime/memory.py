"""Running out of memory: telling it, agreeing on it, and what is learnt from it."""

import gc
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, distributed

from ..errors import DataError
from ..planning.micro_batches import BatchLimits

T = TypeVar("T")

# Windows without a failure after which larger micro-batches are tried again; doubled each time that this fails.
_CALM = 50
_NONE = 2**62  # more tokens than any micro-batch has
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
    """A pass of a window, by its place in the share, that memory ran out in."""

    index: int
    said: str


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller micro-batch may help."""
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
    return isinstance(error, torch.OutOfMemoryError) or told


def give_back_memory() -> None:
    """Hands the allocator's unused memory back to the device, after what held it is gone."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.get_device_module().empty_cache()


def free_on_host() -> int:
    """Bytes that the machine, and the container around the process, if any, have left."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no container, or one without a limit
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free


class ProcessGroup:
    """What the processes agree on, from host to host: no process waits for its device, nor for another's."""

    def __init__(self, group: distributed.ProcessGroup | None, num_processes: int) -> None:
        self.alone = num_processes == 1
        self._group = group

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return self.each([flag])[0]

    def each(self, flags: Iterable[bool]) -> list[bool]:
        """Of equally many flags on every process, whether each is set on any."""
        own = [int(flag) for flag in flags]
        return [bool(n) for n in (own if self.alone else self._reduced(own, distributed.ReduceOp.MAX))]

    def least(self, number: int | None) -> int | None:
        """The least that any process has; None where none has one."""
        if self.alone:
            return number
        (least,) = self._reduced([_NONE if number is None else number], distributed.ReduceOp.MIN)
        return None if least == _NONE else least

    def together(self, make: Callable[[], T]) -> T:
        """What each process makes for itself, when all have made theirs. All call it alike.

        Raises:
            DataError: on all processes, where the data of one of them are at fault; in the words of the first of these.
        """
        if self.alone:
            return make()
        fault: DataError | None = None
        try:
            made = make()
        except DataError as error:
            fault = error
        first = self.least(None if fault is None else distributed.get_rank())
        if first is None:
            return made
        told = [str(fault)]
        distributed.broadcast_object_list(told, src=first, group=self._group)
        raise DataError(f"{told[0]} (Process {first} met it, and all of them end alike.)") from fault

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes, on all processes; what it raises, too, and there with what led to it."""
        if self.alone:
            return make()
        told, own = _pickled(make) if distributed.get_rank() == 0 else (b"", None)
        words: list[Any] = [told]
        distributed.broadcast_object_list(words, src=0, group=self._group)
        made, error = pickle.loads(words[0])
        if error is not None:
            raise own or error
        return made

    def everyone(self, word: T) -> list[T]:
        """What each process says, in order, on all of them."""
        if self.alone:
            return [word]
        words: list[Any] = [None] * distributed.get_world_size(self._group)
        distributed.all_gather_object(words, word, group=self._group)
        return words

    def _reduced(self, numbers: list[int], operation: distributed.ReduceOp.RedOpType) -> list[int]:
        holder: Tensor = torch.tensor(numbers)
        distributed.all_reduce(holder, operation, group=self._group)
        return holder.tolist()


def _pickled(make: Callable[[], Any]) -> tuple[bytes, Exception | None]:
    """What was made, or raised, for other processes, and the error itself."""
    try:
        return pickle.dumps((make(), None)), None
    except Exception as error:  # what cannot be pickled, too: the others wait
        return pickle.dumps((None, error)), error


@contextmanager
def host_process_group(accelerator: Accelerator) -> Iterator[ProcessGroup]:
    """For the time of a run. Where the devices talk over another backend, the hosts get a group of their own."""
    if accelerator.num_processes == 1 or "gloo" in distributed.get_backend():
        yield ProcessGroup(None, accelerator.num_processes)
        return
    group = distributed.new_group(backend="gloo")
    try:
        yield ProcessGroup(group, accelerator.num_processes)
    finally:
        distributed.destroy_process_group(group)


@dataclass
class MemoryLimits:
    """How large micro-batches may be, learnt from those that did not fit.

    Attributes:
        wanted: the caps that the run was asked for.
        caps: those to cut by.
        failures: windows that had to be run again.
    """

    wanted: BatchLimits
    limits: BatchLimits = field(init=False)
    failures: int = 0
    _failed: int = 0  # tokens that did not fit, when everything wanted was tried
    _patience: int = field(default_factory=lambda: _CALM)
    _calm: int = 0
    _grew: bool = False

    def __post_init__(self) -> None:
        self.limits = self.wanted

    def state_dict(self) -> dict[str, Any]:
        learnt = {name: value for name, value in vars(self).items() if name not in ("wanted", "caps")}
        return learnt | {"wanted": astuple(self.wanted), "caps": astuple(self.limits)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What was learnt, if it was learnt of the same caps; how often memory ran out in any case."""
        if tuple(state_dict["wanted"]) == astuple(self.wanted):
            vars(self).update(state_dict | {"wanted": self.wanted, "caps": BatchLimits(*state_dict["caps"])})
        self.failures = state_dict["failures"]

    def ran_out(self, tokens: int) -> None:
        """A micro-batch of as many tokens did not fit: half as many are the most from now on."""
        self._failed = tokens if self.limits == self.wanted else self._failed
        self._patience *= 2 if self._grew else 1
        self._calm, self._grew = 0, False
        self.limits = self.limits.of_tokens(tokens // 2)
        self.failures += 1

    def went_well(self) -> None:
        """A window fitted. After enough of them, micro-batches may be twice as large again, up to what was wanted."""
        self._calm += 1
        if self._calm < self._patience:
            return
        self._calm, self._grew = 0, False
        if self.limits != self.wanted and self.limits.tokens is not None:
            twice = 2 * self.limits.tokens
            self._grew = True
            self.limits = self.wanted if twice >= self._failed else self.wanted.of_tokens(twice)
