"""Count how often Python waits for tensor values, and where. On a GPU, each such wait is a synchronization.

    with HostSyncs() as syncs:
        train()
    syncs.total, syncs.where.most_common(5)

As a script, it prints what it counts for each kind of call:

    .venv/bin/python scripts/host_syncs.py
"""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

_aten = torch.ops.aten
_TORCH = str(Path(torch.__file__).parent)

# Python calls that no kernel identifies, so they are counted as calls.
_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__repr__}
# Kernels that return a value, or a size that depends on values, to the host. `item`, `bool`, `int` and `float` all call
# the first one.
_KERNELS = {
    _aten._local_scalar_dense, _aten.equal, _aten.allclose, _aten.nonzero, _aten.masked_select, _aten._unique2,
    _aten.unique_dim, _aten.unique_consecutive, _aten.bincount, _aten.repeat_interleave,
}  # fmt: skip
_COPIES = {_aten._to_copy, _aten.copy_}
_WRITES_BY_INDEX = {_aten.index_put_, _aten.index_put, _aten._index_put_impl_}


class HostSyncs:
    """A context manager that counts the calls that make Python wait for tensor values on one kind of device.

    It counts `item`, `bool`, `int`, `float`, `tolist`, `numpy`, `np.asarray`, printing, `cpu`, blocking copies to the
    host, and kernels whose result's size depends on values (`nonzero`, `unique`, masks as indices). A call counts once,
    however many other calls it makes. The context can be entered again, also nested, and continues counting.

    On a CPU, it counts the calls that would wait if the tensors were on a GPU, with two limits:

    - It cannot distinguish tensors that are always on the host (a batch that is not on the device yet, AdamW's step
      count) from others, so reads of them count too. `except_under` excludes them.
    - It cannot distinguish moves to the device from moves to the host. `to("cpu")` counts, but
      `to(torch.device("cpu"))`, which loops use to move to the device, does not. A tensor that was moved to the host
      counts as being there, with its views, so `x.cpu().tolist()` is one wait. As a CPU makes no copy, this also holds
      for `x` itself, but not for results computed from it.

    It does not see waits that read nothing (`torch.cuda.synchronize`, events, a full allocator, blocking copies *to*
    the device), reads of whole storages (`torch.save`), DLPack, waits inside kernels (in parts of `torch.linalg`,
    perhaps in extensions), compiled code, and other threads, such as a loader's workers. In Python code that
    `backward()` calls (hooks, recomputed layers), it sees the kernels, but on a CPU not `tolist`, `numpy` and `cpu`.

    Attributes:
        where: number of waits by place, "path/file.py:line"; the place is the innermost frame outside of torch.
    """

    def __init__(self, device_type: str | None = None, except_under: Sequence[str] = ()) -> None:
        """Args:
        device_type: device type of the watched tensors. None: that of the accelerator if there is one, else "cpu".
        except_under: parts of file paths. Calls from these files, direct or indirect, do not count.
        """
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.where: Counter[str] = Counter()
        self._device_type = device_type or ("cpu" if accelerator is None else accelerator.type)
        self._except_under = tuple(except_under)
        self._depth, self._counting = 0, False  # the second is True inside a call that has been counted
        self._on_host = WeakIdKeyDictionary(ref_type=weakref.ref)
        self._entered = ExitStack()

    @property
    def total(self) -> int:
        return self.where.total()

    def __enter__(self) -> "HostSyncs":
        if not self._depth:
            self._entered.enter_context(_Calls(self))
            self._entered.enter_context(_Kernels(self))
        self._depth += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._entered.close()

    def run(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], waits: bool) -> Any:
        """Call the function. If it waits, count it, but none of the calls inside it."""
        if not waits or self._counting:
            return function(*args, **kwargs)
        self._count()
        self._counting = True
        try:
            return function(*args, **kwargs)
        finally:
            self._counting = False

    def watches(self, value: Any) -> bool:
        if not isinstance(value, Tensor) or value.device.type != self._device_type:
            return False
        return value.layout != torch.strided or value.untyped_storage() not in self._on_host

    def moved_to_host(self, value: Tensor) -> None:
        if value.layout == torch.strided:  # other layouts have no single storage
            self._on_host[value.untyped_storage()] = True

    def _count(self) -> None:
        place = "torch"
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            file = frame.f_code.co_filename
            if any(part in file for part in self._except_under):
                return
            if place == "torch" and file != __file__ and not file.startswith(_TORCH):
                place = f"{file}:{frame.f_lineno}"
            frame = frame.f_back
        self.where[place] += 1


class _Calls(TorchFunctionMode):
    """A mode that intercepts calls from Python."""

    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self._syncs = syncs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, syncs = kwargs or {}, self._syncs
        moves = func is Tensor.cpu or (func is Tensor.to and "cpu" in _words(args, kwargs))
        waits = (moves and not _in_passing(kwargs)) or func in _READS
        found = syncs.run(func, args, kwargs, waits=waits and syncs.watches(args[0]))
        if moves:
            syncs.moved_to_host(found)
        return found


class _Kernels(TorchDispatchMode):
    """A mode that intercepts kernels, including those that C++ code calls."""

    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self._syncs = syncs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, kernel = kwargs or {}, func.overloadpacket
        if kernel in _COPIES:
            waits = self._copies_to_host(kernel, args, kwargs)
        else:
            waits = any(map(self._syncs.watches, args)) and (kernel in _KERNELS or _masks(kernel, args))
        return self._syncs.run(func, args, kwargs, waits)

    def _copies_to_host(self, kernel: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        source = args[1] if kernel is _aten.copy_ else args[0]
        target = args[0].device if kernel is _aten.copy_ else kwargs.get("device") or source.device
        in_passing = _in_passing(kwargs) or (kernel is _aten.copy_ and True in args[2:])
        moves = source.device.type != "cpu" and target.type == "cpu"
        return moves and self._syncs.watches(source) and not in_passing


def _words(args: Sequence[Any], kwargs: dict[str, Any]) -> list[str]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, str)]


def _in_passing(kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking"))


def _masks(kernel: Any, args: Sequence[Any]) -> bool:
    """Return whether a kernel uses a mask as an index, so that it must count the mask's true elements."""
    writes = kernel in _WRITES_BY_INDEX and args[2].numel() != 1  # filling in a single value does not wait
    by_index = writes or kernel is _aten.index
    return by_index and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def main() -> None:
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    calls: dict[str, Callable[[], Any]] = {
        "x.sum()": lambda: x.sum(),
        "x[0].item()": lambda: x[0].item(),
        "bool(x.any())": lambda: bool(x.any()),
        "f'{x[0]:.2f}'": lambda: f"{x[0]:.2f}",
        "x.tolist()": lambda: x.tolist(),
        "np.asarray(x)": lambda: np.asarray(x),
        "x.cpu().tolist()": lambda: (x + 1).cpu().tolist(),
        "x.to('cpu')": lambda: (x + 1).to("cpu"),
        "x.to(device, non_blocking=True)": lambda: x.to(x.device, non_blocking=True),
        "torch.equal(x, x)": lambda: torch.equal(x, x),
        "x[mask]": lambda: x[mask],
        "x[mask] = 0": lambda: x.__setitem__(mask, 0),
        "repr(x)": lambda: repr(x),
    }
    for name, call in calls.items():
        with HostSyncs("cpu") as syncs:
            call()
        print(f"{syncs.total}  {name}")


if __name__ == "__main__":
    main()
