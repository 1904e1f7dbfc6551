"""Runs of the contenders of scripts/bench_trainer.py: their time, their counts and their peak memory."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from embeddings_task import memory
from ftaccum.accumulation.audit import GradientAuditor
from ftaccum.bridges.trainer import measured_trainer
from ftaccum.training import build_objective
from host_syncs import HostSyncs
from jobs import Job
from measuring import DEVICE, Passes, now, quiet, short
from peers import Contender

# Code that reads tensors which stay on the host even with a GPU. On a CPU they cannot be recognized: ftaccum's batches
# before they are sent to the device, and AdamW's step count.
ON_HOST = ("ftaccum/data/", "torch/optim/adam.py")
# Places where the models themselves wait once or twice per forward pass, in every contender.
IN_MODEL = ("transformers/masking_utils.py", "transformers/models/")


@dataclass(frozen=True)
class Timing:
    """The seconds of a run.

    Attributes:
        before, seconds: before the first forward pass of training, with ftaccum's self-check and first audit, and from
            there to the end.
        steady: per update, from the end of the first update to the end of the last; None with fewer than two updates.
        updates: number of updates.
        self_check: of `before`, those of ftaccum's self-check.
        audits, steady_audits: in all audits, and per update in those after the first update.
    """

    before: float
    seconds: float
    steady: float | None
    updates: int
    self_check: float
    audits: float
    steady_audits: float | None

    @property
    def whole(self) -> float:
        return self.before + self.seconds

    def __str__(self) -> str:
        update = "" if self.steady is None else f", {self.steady:.2f} s an update in steady state"
        return f"{self.whole:.2f} s{update}"


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


class _Span(NamedTuple):
    """A period of time."""

    start: float
    seconds: float


def timed(contender: Contender, job: Job) -> Timing:
    model, first = job.workload.new_model(), list[float]()
    passes = Passes(model, lambda: first.append(now()))
    with quiet(job.seed), _steps(model) as steps, RecordedChecks(passes) as checks:
        started = now()
        contender(model, job)
        ended = now()
    n = len(steps) - 1
    return Timing(
        before=first[0] - started,
        seconds=ended - first[0],
        steady=(steps[-1] - steps[0]) / n if n else None,
        updates=len(steps),
        self_check=sum(check.seconds for check in checks.self_checks),
        audits=sum(audit.seconds for audit in checks.audits),
        steady_audits=sum(audit.seconds for audit in checks.audits if audit.start > steps[0]) / n if n else None,
    )


def counted(contender: Contender, job: Job) -> Counts:
    """Run a contender without timing, and count, without ftaccum's self-check and audits.

    Waits count from the first forward pass on, as on a GPU: there, ftaccum keeps the gradients of embeddings dense.
    """
    model = job.workload.new_model()
    with (
        patch("ftaccum.runtime.gradients.sparse._can_be_sparse", return_value=False),
        HostSyncs(except_under=ON_HOST) as syncs,
    ):
        passes = Passes(model, syncs.where.clear)
        with quiet(job.seed), RecordedChecks(passes, syncs.where):
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
def _steps(model: Any) -> Iterator[list[float]]:
    """Record the time at the end of each step of the model's optimizer."""
    ends, weights = list[float](), {id(weight) for weight in model.parameters()}

    def record(optimizer: Any, *_: Any) -> None:
        if id(optimizer.param_groups[0]["params"][0]) in weights:  # ftaccum tries out the schedule with another one
            ends.append(now())

    hook = register_optimizer_step_post_hook(record)
    try:
        yield ends
    finally:
        hook.remove()


class RecordedChecks:
    """A context manager that records ftaccum's self-checks and audits, whose passes and waits it does not count."""

    def __init__(self, passes: Passes, waits: Counter[str] | None = None) -> None:
        self.self_checks, self.audits = list[_Span](), list[_Span]()
        self._passes, self._waits, self._patches = passes, Counter[str]() if waits is None else waits, ExitStack()

    def __enter__(self) -> "RecordedChecks":
        for module in (build_objective, measured_trainer):
            self._record(module, "measured_objective", self.self_checks)
        self._record(build_objective, "find_labelled_head", self.self_checks)
        self._record(GradientAuditor, "audit", self.audits)
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _record(self, owner: Any, name: str, spans: list[_Span]) -> None:
        function = getattr(owner, name)

        def recording(*given: Any, **options: Any) -> Any:
            waits, started = self._waits.copy(), now()
            self._passes.paused = True
            try:
                return function(*given, **options)
            finally:
                self._passes.paused = False
                spans.append(_Span(started, now() - started))
                self._waits.clear()
                self._waits.update(waits)

        self._patches.enter_context(patch.object(owner, name, recording))
