"""Peak memory and time of the loops of `habit_loop`, on one device."""

import gc
import time
from typing import Any

import torch

from .habit_loop import LOOPS, train
from .job import Job, accelerator

_ON_A_GPU = {"pixels": 128, "channels": 128, "n_images": 320}
_ON_A_CPU = {"pixels": 8, "channels": 8, "n_images": 80}  # shows only that it works
_MOST_ROUNDS = 10
_SHARE = 0.7  # of the part's time; the rest is for the start of the process


def measure_habits(job: Job, rank: int) -> dict[str, Any]:  # noqa: ARG001
    """Return the peaks of each loop, and its seconds in several interleaved rounds.

    "peak" has the bytes that tensors have taken, "reserved" those that PyTorch has reserved for them; None on a CPU.
    The first round is not timed if there is time for another one.
    """
    started = time.monotonic()
    sizes = _ON_A_CPU if accelerator() is None else _ON_A_GPU
    found: dict[str, Any] = {"peak": {}, "reserved": {}, "seconds": {loop: [] for loop in LOOPS}, "sizes": sizes}
    for n in range(1 + _MOST_ROUNDS):
        for loop in LOOPS:
            _start_anew()
            seconds = train(loop, **sizes)
            found["peak"][loop], found["reserved"][loop] = _peaks()
            if n == 1:
                found["seconds"][loop].clear()
            found["seconds"][loop].append(seconds)
        if (time.monotonic() - started) * (n + 2) / (n + 1) > _SHARE * job.seconds:
            break
    return found


def _start_anew() -> None:
    if accelerator() is not None:
        gc.collect()
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()


def _peaks() -> tuple[int | None, int | None]:
    if accelerator() is None:
        return None, None
    return torch.accelerator.max_memory_allocated(), torch.accelerator.max_memory_reserved()
