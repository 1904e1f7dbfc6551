"""What the benchmarks share: what they watch, the clock, and the line that says where figures come from."""

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
from torch import Tensor
from transformers import set_seed

DEVICE = (torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or torch.device("cpu")


class Passes:
    """Sees the forward passes of training through a hook on the model."""

    def __init__(self, model: Any, on_first: Callable[[], None]) -> None:
        self.positions, self.passes, self._masks = 0, 0, list[Tensor]()
        self._on_first = on_first
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    @property
    def tokens(self) -> int:
        return sum(int(mask.sum()) for mask in self._masks)

    def _see(self, model: Any, _: Any, given: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        if not self.passes:
            self._on_first()
        self.passes += 1
        ids, mask = given["input_ids"], given.get("attention_mask")
        self.positions += ids.numel()
        self._masks.append(torch.ones_like(ids) if mask is None else mask)


@contextlib.contextmanager
def quiet(seed: int) -> Iterator[None]:
    """As in a process of its own: Accelerate's state and the generators as new, no garbage of the last contender."""
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
    """A place in a file, without the folders that differ between machines."""
    return "/".join(Path(place).parts[-3:])


def machine() -> str:
    """Versions, processor, threads and command, to print above figures."""
    modules = (torch, transformers, accelerate)
    versions = [f"Python {platform.python_version()}", *(f"{m.__name__} {m.__version__}" for m in modules)]
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else _processor()
    command = shlex.join(["python", "scripts/" + Path(sys.argv[0]).name, *sys.argv[1:]])
    return f"{', '.join(versions)}; {device}, {torch.get_num_threads()} thread(s); `{command}`"


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    return platform.processor() or platform.machine()
