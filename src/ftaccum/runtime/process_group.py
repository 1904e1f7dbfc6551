"""Communication between the processes of a run, from host to host. Nothing here waits for a device."""

import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed
from torch.distributed import DistError

from ..errors import DataError, LostProcessError, MetricsError, SettingsError
from .background import start_thread

T = TypeVar("T")

_SHARED = (DataError, SettingsError, MetricsError)  # errors of one process that `run_on_all` raises on all of them
_POLL = 5.0  # seconds between messages to processes that wait for a long call
_NONE = 2**62  # represents None in a reduction over integers


class ProcessGroup:
    """The processes of one run or one trial. All of them make the same calls in the same order.

    Attributes:
        size: number of processes.
        is_single: whether there is only one process, so that no call communicates.
        is_main: whether this is the first process.
        index: the rank of this process.
    """

    def __init__(self, size: int, group: distributed.ProcessGroup | None = None) -> None:
        """Create a process group.

        Args:
            size: number of processes.
            group: torch's group of the same processes, which communicates between hosts (gloo); None for the default
                group.
        """
        self.size, self.is_single = size, size == 1
        self.index = 0 if self.is_single else distributed.get_rank()
        self.is_main = self.index == 0
        self._group = group

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any process."""
        return self.any_of([flag])[0]

    def any_of(self, flags: Iterable[bool]) -> list[bool]:
        """Return for each flag whether it is true on any process. All processes pass the same number of flags."""
        own = [int(flag) for flag in flags]
        return [bool(n) for n in (own if self.is_single else self._reduce(own, distributed.ReduceOp.MAX))]

    def min(self, number: int | None) -> int | None:
        """Return the smallest number of any process; None if all have None."""
        if self.is_single:
            return number
        (least,) = self._reduce([_NONE if number is None else number], distributed.ReduceOp.MIN)
        return None if least == _NONE else least

    def broadcast(self, value: Any = None) -> Any:
        """Return the main process's value on every process."""
        values = [value]
        if not self.is_single:
            distributed.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in order of rank, on every process."""
        if self.is_single:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self._group)
        return values

    def gather_on_main(self, value: T) -> list[T]:
        """Return the values of all processes, in order of rank, on the main process; an empty list on the others."""
        if self.is_single:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        distributed.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def run_on_main(self, function: Callable[[], T]) -> T:
        """Call `function` on the main process and return its result on every process.

        Raises:
            BaseException: whatever `function` raises on the main process. The other processes raise the same error, or
                a RuntimeError that quotes it if it cannot be pickled.
        """
        if self.is_single:
            return function()
        sent, own_error = _call_and_pickle(function) if self.is_main else (b"", None)
        result, error = pickle.loads(self.broadcast(sent))
        if own_error is not None:
            raise own_error
        if error is not None:
            raise error
        return result

    def run_long_on_main(self, function: Callable[[], T]) -> T:
        """Do the same as `run_on_main`, for a function that may take longer than the other processes can wait.

        With several processes, `function` runs in a thread of its own.
        """
        if self.is_single:
            return function()
        future = start_thread(function) if self.is_main else None
        while not self.broadcast(future is not None and bool(wait([future], _POLL).done)):
            pass
        return self.run_on_main(lambda: cast(Future[T], future).result())

    def run_on_all(self, function: Callable[[], T]) -> T:
        """Call `function` on every process and return each process's own result.

        Raises:
            DataError, SettingsError, MetricsError: on all processes, if `function` raises one of these on any of them.
                The message is from the lowest rank.
        """
        if self.is_single:
            return function()
        fault: Exception | None = None
        try:
            result = function()
        except _SHARED as error:
            fault = error
        first = self.min(None if fault is None else distributed.get_rank())
        if first is None:
            return result
        raised: list[Any] = [next((n for n, kind in enumerate(_SHARED) if isinstance(fault, kind)), None), str(fault)]
        distributed.broadcast_object_list(raised, src=first, group=self._group)
        message = f"{raised[1]} (Process {first} raised this, so all processes stop.)"
        kind = _SHARED[raised[0]]
        raise (SettingsError([message]) if kind is SettingsError else kind(message)) from fault

    def _reduce(self, numbers: list[int], operation: distributed.ReduceOp.RedOpType) -> list[int]:
        holder: Tensor = torch.tensor(numbers)
        distributed.all_reduce(holder, operation, group=self._group)
        return holder.tolist()


SINGLE = ProcessGroup(1)
_lasting: WeakKeyDictionary[distributed.ProcessGroup, ProcessGroup] = WeakKeyDictionary()  # by torch's default group


def of_main_process(value: T) -> T:
    """Return the first process's value on every process of torch's default group, if there is one."""
    values = [value]
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def open_process_group(size: int, timeout: timedelta | None = None) -> Iterator[ProcessGroup]:
    """Open a group over all processes, and close it on exit. All processes call this.

    It uses the default group, unless there is a timeout or the default group communicates between devices.

    Args:
        size: number of processes.
        timeout: how long a call may wait for another process; None for torch's default.
    """
    if size == 1 or (timeout is None and _communicates_between_hosts()):
        yield ProcessGroup(size)
        return
    group = distributed.new_group(backend="gloo", timeout=timeout)
    try:
        yield ProcessGroup(size, group)
    finally:
        distributed.destroy_process_group(group)


def lasting_process_group(size: int) -> ProcessGroup:
    """Return the group over all processes that lasts as long as torch's default group. All processes call this.

    It is for objects that nobody closes. All of them share one group, so that they do not each open a connection.

    Args:
        size: number of processes, which torch's default group has, or 1.
    """
    if size == 1:
        return SINGLE
    default = distributed.group.WORLD
    assert default is not None, "several processes have a default group"
    if default not in _lasting:
        group = None if _communicates_between_hosts() else distributed.new_group(backend="gloo")
        _lasting[default] = ProcessGroup(size, group)
    return _lasting[default]


@contextmanager
def report_lost_process(is_single: bool, describe: Callable[[], str]) -> Iterator[None]:
    """Raise LostProcessError if a collective operation fails because another process is gone.

    Args:
        is_single: whether there are no other processes.
        describe: called after such a failure; returns sentences on how far the run came and how to resume it.
    """
    try:
        yield
    except LostProcessError:
        raise
    except Exception as error:
        cause = None if is_single else _error_of_collective(error)
        if cause is None:
            raise
        raise LostProcessError(
            f"Another process of this run has ended or does not respond, and the run cannot continue without it. "
            f"{describe()} The error was: {cause}"
        ) from error


def _communicates_between_hosts() -> bool:
    """Return whether torch's default group does."""
    return "gloo" in distributed.get_backend()


def _call_and_pickle(function: Callable[[], Any]) -> tuple[bytes, BaseException | None]:
    """Return (result, None) or (None, error), pickled for the other processes, and the error itself."""
    try:
        return pickle.dumps((function(), None)), None
    except BaseException as error:  # also a result that cannot be pickled: the other processes are waiting
        try:
            sent = pickle.dumps((None, error))
            pickle.loads(sent)
        except Exception:
            sent = pickle.dumps((None, RuntimeError(f"The main process failed: {error!r}")))
        return sent, error


def _error_of_collective(error: BaseException | None) -> BaseException | None:
    """Return the error of a collective operation among the causes of `error`, if any. (Checks wrap it in their own.)"""
    while error is not None and not _is_of_collective(error):
        error = error.__cause__
    return error


def _is_of_collective(error: BaseException) -> bool:
    message = str(error)
    words = "gloo" in message or "NCCL" in message or "onnection closed by peer" in message
    return isinstance(error, DistError) or (type(error) is RuntimeError and words)
