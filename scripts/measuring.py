"""Shared code of the benchmarks: hooks, the clock, and a line that describes the machine."""

import contextlib
import gc
import io
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from transformers import set_seed

DEVICE = (torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or torch.device("cpu")


class Passes:
    """A counter of the forward passes of training.

    It counts calls of the model, not by a hook: ftaccum does not cache its verdict on a model with hooks.

    Attributes:
        paused: whether to ignore passes.
    """

    def __init__(self, model: Any, on_first: Callable[[], None]) -> None:
        self.positions, self.passes, self._masks = 0, 0, list[Tensor]()
        self.paused, self._on_first = False, on_first
        self._id = id(model)
        setattr(type(model), "__call__", _Watched(self._see))  # noqa: B010

    @property
    def tokens(self) -> int:
        return sum(int(mask.sum()) for mask in self._masks)

    def _see(self, model: Any, given: dict[str, Any]) -> None:
        if id(model) != self._id or self.paused or not (model.training and torch.is_grad_enabled()):
            return
        if not self.passes:
            self._on_first()
        self.passes += 1
        ids, mask = given["input_ids"], given.get("attention_mask")
        self.positions += ids.numel()
        self._masks.append(torch.ones_like(ids) if mask is None else mask)


class _Watched:
    """The method `__call__` of a class of models, which reports each call before it takes place."""

    def __init__(self, see: Callable[[Any, dict[str, Any]], None]) -> None:
        self._see = see

    def __get__(self, model: Any, _: type) -> Callable[..., Any]:
        def call(*inputs: Any, **given: Any) -> Any:
            self._see(model, given)
            return nn.Module.__call__(model, *inputs, **given)

        return call


@contextlib.contextmanager
def quiet(seed: int) -> Iterator[None]:
    """Reset Accelerate's state, the random generators and garbage, as in a new process, and hide standard output."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    set_seed(seed)
    gc.collect()
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def now() -> float:
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def short(place: str) -> str:
    """Return a place in a file without the leading folders, which differ between machines."""
    return "/".join(Path(place).parts[-3:])


def machine() -> str:
    """Return versions, processor, threads and command, to print above the figures."""
    command = shlex.join(["python", "scripts/" + Path(sys.argv[0]).name, *sys.argv[1:]])
    return f"{describe_machine()}; `{command}`"


def describe_machine() -> str:
    """Return versions, processor and threads."""
    modules = (torch, transformers, accelerate)
    versions = [f"Python {platform.python_version()}", *(f"{m.__name__} {m.__version__}" for m in modules)]
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else _processor()
    return f"{', '.join(versions)}; {device}, {torch.get_num_threads()} thread(s)"


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    return platform.processor() or platform.machine()
