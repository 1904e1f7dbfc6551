"""Peak memory and tokens per second of updates, in each way to train."""

import time
from statistics import median
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from ftaccum import test_fine_tuning

from .job import Job, accelerator, new_model, rows_of

K = 2  # micro-batches of an update
UPDATES = 4  # the first one creates the optimizer's state, and is not timed
_MOST_REPEATS = 5
_SHARE = 0.7  # of the part's time; the rest is for the start of the processes


class Clock(TrainerCallback):
    """Measures the updates after the first: their seconds, and the peak bytes of the device."""

    def __init__(self) -> None:
        self.started = self.seconds = 0.0
        self.before: int | None = None
        self.peak: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if state.global_step == 1:
            _wait()
            self.before = _peak()
            if accelerator() is not None:
                torch.accelerator.reset_peak_memory_stats()
            self.started = time.perf_counter()
        elif state.global_step == UPDATES:
            _wait()
            self.seconds, self.peak = time.perf_counter() - self.started, _peak()


def measure(job: Job, rank: int) -> dict[str, Any]:
    """Return the tokens per second and the peak bytes by way, each from several interleaved runs.

    The first round only counts if there is no time for another one. Further rounds run as long as the time allows.
    """
    started = time.monotonic()
    base = new_model(job.model)
    rows = rows_of(base.config.vocab_size, UPDATES * K * job.batch_size * job.num_processes, job.length)
    tokens = (UPDATES - 1) * K * job.batch_size * job.num_processes * job.length
    speeds: dict[str, list[float]] = {way: [] for way in job.ways}
    peaks: dict[str, dict[str, int | None]] = {}
    for repeat in range(1 + _MOST_REPEATS):
        for way in _rotated(list(job.ways), repeat):
            clock = timed_run(base, rows, job, way)
            peaks[way] = {"peak": clock.peak, "peak before": clock.before}
            if repeat == 1:
                speeds[way].clear()
            speeds[way].append(tokens / clock.seconds)
        per_round = (time.monotonic() - started) / (repeat + 1)
        is_over = time.monotonic() - started + per_round > _SHARE * job.seconds
        if _decided_by_main(is_over, job, rank):
            break
    return {
        "tokens per second": {way: median(values) for way, values in speeds.items()},
        "repeats": len(next(iter(speeds.values()))),
        "memory": peaks,
        "autocast": precision() is not None,
    }


def timed_run(base: Any, rows: list[Any], job: Job, way: str) -> Clock:
    """Train a copy of a model, and return its clock."""
    model, clock = type(base)(base.config), Clock()
    model.load_state_dict(base.state_dict())
    test_fine_tuning(
        model, train_data=rows, n_epochs=1, validation_split=0.0, batch_size=job.batch_size,
        gradient_accumulation_steps=K, mixed_precision=precision(), audit=False, progress=False, callbacks=[clock],
        **job.ways[way],
    )  # fmt: skip
    del model
    if accelerator() is not None:
        torch.accelerator.empty_cache()
    return clock


def precision() -> str | None:
    """Return the precision of these runs: bf16 on a GPU that has it, else full."""
    device = accelerator()
    if device is None or (device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)):
        return None
    return "bf16"


def _rotated(ways: list[str], n: int) -> list[str]:
    return ways[n % len(ways):] + ways[: n % len(ways)]  # fmt: skip


def _wait() -> None:
    if accelerator() is not None:
        torch.accelerator.synchronize()


def _peak() -> int | None:
    """Return the most bytes that tensors have taken on the device of this process; None on a CPU."""
    return None if accelerator() is None else torch.accelerator.max_memory_allocated()


def _decided_by_main(flag: bool, job: Job, rank: int) -> bool:
    """Return the main process's flag, so that all processes end with the same round."""
    flags = [flag if rank == 0 else None]
    if job.num_processes > 1:
        broadcast_object_list(flags)
    return bool(flags[0])
