"""Measure what fitted costs of a pass would gain over the planner's default costs, on both workloads and one thread.

First, the script times passes of many shapes inside `test_fine_tuning`, from one forward pass to the next in the same
update, and fits three costs: per pass, per padded token, and per row × squared width. Then it times the same updates
with `planner_costs` set to (a) the default, (b) the fitted costs, (c) these rounded to powers of two, interleaved in
rounds, in rotating order. Ratios are medians of the rounds' ratios to (a); below 1 is faster than the default.
Processor seconds exclude the time in which other programs used the core.

Last, it computes without timing what the default split of an epoch costs relative to the cheapest split, if passes have
the fitted costs or other fixed costs (on a GPU, many tokens). No other costs can gain more than that.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/compare_costs.py
"""

import argparse
import math
import os
import sys
import time
from dataclasses import astuple
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import datasets
import numpy as np
import torch
import transformers
from scipy.optimize import nnls
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ftaccum import plan
from ftaccum.planning.micro_batches import DEFAULT_COSTS, BatchLimits, CostModel, MicroBatchPlanner
from jobs import Job
from measuring import DEVICE, Passes, machine, now, quiet
from peers import fine_tune
from workloads import WORKLOADS, Workload

Costs = tuple[float, float, float]

DEFAULT: Costs = astuple(DEFAULT_COSTS)
# Costs that give various shapes for the fit: the default split, narrow micro-batches and full micro-batches.
SHAPES: tuple[Costs, ...] = (DEFAULT, (4.0, 1.0, 0.0), (1e6, 1.0, 0.0))
PER_PASS = (16.0, 32.0, 128.0, 256.0, 1024.0, 4096.0)  # costs per pass for the bound; the other costs are the defaults
UPDATES = {"movies": 6, "long-tailed": 3}  # per timed run
BATCH, K, SEED = 8, 8, 42


class PassTimes:
    """The shortest time of each shape of pass, because other programs can only lengthen it.

    On a CPU these are processor seconds. The last pass of an update does not count, because clipping follows it.
    """

    def __init__(self) -> None:
        self.least: dict[tuple[int, int], float] = {}
        self._begun: tuple[tuple[int, int], float] | None = None

    def forget(self, *_: Any) -> None:
        self._begun = None

    def begin(self, model: Any, _: Any, given: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        at = time.process_time() if DEVICE.type == "cpu" else now()
        if self._begun is not None:
            shape, begun_at = self._begun
            self.least[shape] = min(self.least.get(shape, math.inf), at - begun_at)
        self._begun = (tuple(given["input_ids"].shape), at)


def fitted(workload: Workload, updates: int) -> Costs:
    """Fit costs, in units of one token's time, by non-negative least squares of relative errors."""
    times = PassTimes()
    with register_optimizer_step_pre_hook(times.forget):
        for costs in SHAPES * 3:
            model = workload.new_model()
            model.register_forward_pre_hook(times.begin, with_kwargs=True)
            with quiet(SEED):
                fine_tune(model, _job(workload, updates), planner_costs=costs)
    shapes_N3 = np.array([[1.0, rows * width, rows * width**2] for rows, width in times.least])
    relative_N3 = shapes_N3 / np.array(list(times.least.values()))[:, None]
    found_3, _ = nnls(relative_N3, np.ones(len(relative_N3)))
    error = median(np.abs(relative_N3 @ found_3 - 1))
    print(f"\n{workload.name}: {len(relative_N3)} shapes, {1e6 * found_3[1]:.0f} µs a token, median error {error:.0%}")
    per_pass, per_token, per_square = (found_3 / (found_3[1] or found_3[2] or found_3[0])).tolist()
    return per_pass, per_token, per_square


def compare(workload: Workload, contenders: dict[str, Costs], updates: int, rounds: int) -> None:
    job, names = _job(workload, updates), list(contenders)
    wall, processor = ({name: list[float]() for name in names} for _ in range(2))
    seen: dict[str, Passes] = {}
    for number in range(rounds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            begun = list[tuple[float, float]]()
            seen[name] = Passes(model := workload.new_model(), partial(_note_time, begun))
            with quiet(SEED):
                fine_tune(model, job, planner_costs=contenders[name])
            wall[name].append(now() - begun[0][0])
            processor[name].append(time.process_time() - begun[0][1])
    print(f"\n{workload.name}: {job.updates} updates of {BATCH} × {job.k} rows, {rounds} rounds\n")
    print("| costs | passes an update | padded per token | seconds | ratio to (a) (range) | of processor's (range) |")
    print("|" + " --- |" * 6)
    for name, passes in seen.items():
        cells = [name, f"{passes.passes / job.updates:.2f}", f"{passes.positions / passes.tokens:.3f}",
                 f"{median(wall[name]):.2f}", _ratios(wall, name), _ratios(processor, name)]  # fmt: skip
        print(f"| {' | '.join(cells)} |")


def _note_time(times: list[tuple[float, float]]) -> None:
    times.append((now(), time.process_time()))


def _ratios(seconds: dict[str, list[float]], name: str) -> str:
    ratios = [one / first for one, first in zip(seconds[name], next(iter(seconds.values())), strict=True)]
    return f"{median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})"


def bound(workload: Workload, found: Costs) -> None:
    lengths = [len(ids) for ids in workload.rows["input_ids"]]
    limits = {
        f"{BATCH} rows": BatchLimits(BATCH),
        f"{BATCH * max(lengths)} tokens": BatchLimits(None, BATCH * max(lengths)),
    }
    columns = {f"{BATCH * k} rows, at most {name} a pass": (k, at) for name, at in limits.items() for k in (8, 32)}
    print(f"\n{workload.name}: cost of the default split relative to the cheapest split\n")
    print(f"| if passes cost | {' | '.join(columns)} |\n|{' --- |' * (1 + len(columns))}")
    for costs in (found, *((per_pass, *DEFAULT[1:]) for per_pass in PER_PASS)):
        label = ", ".join(f"{cost:.3g}" for cost in costs) + (" (fitted)" if costs is found else "")
        losses = [_cost(lengths, *at, DEFAULT, costs) / _cost(lengths, *at, costs, costs) for at in columns.values()]
        print(f"| {' | '.join([label, *(f'{loss:.3f}' for loss in losses)])} |")


def _cost(lengths: list[int], k: int, limits: BatchLimits, cut_by: Costs, costs: Costs) -> float:
    """Return the cost of an epoch in windows of BATCH × k rows, by the planner's own arithmetic."""
    windows = plan(len(lengths), effective_batch_size=BATCH * k, validation_split=0.0, random_seed=SEED).windows(0)
    planner, model = MicroBatchPlanner(limits, CostModel(*cut_by)), CostModel(*costs)
    cuts = (planner.split(window.rows, [lengths[row] for row in window.rows])[0] for window in windows)
    return sum(float(model.of(piece.tokens, piece.width)) for cut in cuts for piece in cut)


def _job(workload: Workload, updates: int) -> Job:
    return Job(workload, workload.rows.select(range(updates * BATCH * K)), BATCH, K, SEED, "no")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, help="updates per timed run (default: set by the workload)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    print(machine())
    for name, make in WORKLOADS.items():
        workload, updates = make(SEED), options.updates or UPDATES[name]
        found = fitted(workload, 2)
        first, second, third = (2.0 ** round(np.log2(cost)) if cost else 0.0 for cost in found)
        contenders: dict[str, Costs] = {"(a) default": DEFAULT, "(b) fitted": found}
        contenders["(c) rounded"] = (first, second, third)
        print(*(f"{label}: {', '.join(f'{cost:.4g}' for cost in costs)}" for label, costs in contenders.items()))
        compare(workload, contenders, updates, options.rounds)
        bound(workload, found)


if __name__ == "__main__":
    main()
