"""Runs of the contenders of scripts/bench_trainer.py: their time, their counts and their peak memory."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from embeddings_task import memory
from ftaccum.bridges.trainer import measured_trainer
from ftaccum.training import build_data
from host_syncs import HostSyncs
from jobs import Job
from measuring import DEVICE, Passes, now, quiet, short
from peers import Contender

# Code that reads tensors which stay on the host even with a GPU. On a CPU they cannot be recognised: ftaccum's batches
# before they are sent to the device, and AdamW's step count.
ON_HOST = ("ftaccum/data/", "torch/optim/adam.py")
# Places where the models themselves wait once or twice per forward pass, in every contender.
IN_MODEL = ("transformers/masking_utils.py", "transformers/models/")
_SELF_CHECKS = (build_data, measured_trainer)


@dataclass(frozen=True)
class Timing:
    """The seconds of a run.

    Attributes:
        before, seconds: before the first forward pass of training, and from there to the end.
        steady: per update, from the end of the first update to the end of the last; None with fewer than two updates.
        updates: number of updates.
        self_check: of `before`, those of ftaccum's self-check.
        audits, steady_audits: in all audits and in those after the first update, per update; None if not known.
    """

    before: float
    seconds: float
    steady: float | None
    updates: int
    self_check: float
    audits: float | None
    steady_audits: float | None

    @property
    def whole(self) -> float:
        return self.before + self.seconds


@dataclass(frozen=True)
class Counts:
    """Counts of one run: positions with and without padding, forward passes, and waits for tensor values, in total, in
    the model's own code, and by place."""

    positions: int
    tokens: int
    passes: int
    waits: int
    waits_in_model: int
    waited_at: dict[str, int]


def timed(contender: Contender, job: Job) -> Timing:
    model, first = job.workload.new_model(), list[float]()
    Passes(model, lambda: first.append(now()))
    with quiet(job.seed), _steps() as steps, _self_checks() as checks:
        started = now()
        result = contender(model, job)
        ended = now()
    n = len(steps) - 1
    audits = getattr(result, "audits", None)  # only ftaccum returns a result
    later = None if audits is None or not n else sum(a["seconds"] for a in audits if a["audit"] > 1) / n
    return Timing(
        first[0] - started,
        ended - first[0],
        (steps[-1] - steps[0]) / n if n else None,
        len(steps),
        sum(checks),
        None if audits is None else sum(audit["seconds"] for audit in audits),
        later,
    )


def counted(contender: Contender, job: Job) -> Counts:
    """Run a contender without timing, and count.

    Waits count from the first forward pass on, as on a GPU: there, ftaccum keeps the gradients of embeddings dense.
    """
    model = job.workload.new_model()
    with (
        patch("ftaccum.runtime.gradients.sparse._can_be_sparse", return_value=False),
        HostSyncs(except_under=ON_HOST) as syncs,
    ):
        passes = Passes(model, syncs.where.clear)
        with quiet(job.seed):
            contender(model, job)
    in_model = sum(n for place, n in syncs.where.items() if any(part in place for part in IN_MODEL))
    places = {short(place): n for place, n in syncs.where.most_common()}
    return Counts(passes.positions, passes.tokens, passes.passes, syncs.total, in_model, places)


def grown(contender: Contender, job: Job) -> int:
    """Return the bytes by which memory grows at most in a run: on a GPU the allocator's, weights included, and on a CPU
    the resident memory of this process, which must not have trained before, beyond the weights."""
    model = job.workload.new_model()
    before = 0
    if DEVICE.type == "cpu":
        with contextlib.suppress(OSError):  # not every sandbox allows it; the peak of loading then counts, too
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the memory in use
        before = memory().now
    with quiet(job.seed):
        contender(model, job)
    return memory().peak - before if DEVICE.type == "cpu" else torch.cuda.max_memory_allocated()


@contextlib.contextmanager
def _steps() -> Iterator[list[float]]:
    """Note the time at the end of each step of any optimizer."""
    ends: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(now()))
    try:
        yield ends
    finally:
        hook.remove()


@contextlib.contextmanager
def _self_checks() -> Iterator[list[float]]:
    """Note the seconds of each self-check."""
    seconds: list[float] = []

    def noting(check: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **options: Any) -> Any:
            started = now()
            try:
                return check(*given, **options)
            finally:
                seconds.append(now() - started)

        return run

    with contextlib.ExitStack() as stack:
        for module in _SELF_CHECKS:
            check = module.measured_objective
            stack.enter_context(patch.object(module, "measured_objective", noting(check)))
        yield seconds
