"""Measure the cost of the gradient noise scale and of audits, in CPU seconds per update.

    .venv/bin/python scripts/bench_noise_scale.py
    .venv/bin/python scripts/bench_noise_scale.py --workload long-tailed --k 8 --updates 6 --rounds 5
    .venv/bin/python scripts/bench_noise_scale.py --processes 2

Runs without measurements, with them, and with audits alternate. They train on the same rows from the same weights, and
the first update does not count. With noise_scale=1 every update is measured, and with audit=2 every second one is
audited. From their cost follow that of noise_scale="auto", which measures every tenth update, and that of audit=True
in a run of --long updates.
With several processes, which torchrun starts, the seconds are sums over all of them.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback

import ftaccum
from ftaccum.planning.audit_schedule import AuditSchedule
from ftaccum.planning.halves import AUTO_EVERY
from measuring import DEVICE, machine, quiet
from workloads import WORKLOADS, Workload

_RUNS: Mapping[str, dict[str, Any]] = {
    "plain": {"noise_scale": False, "audit": False},
    "measured": {"noise_scale": 1, "audit": False},
    "audited": {"noise_scale": False, "audit": 2},
}
_EVERY = {"measured": 1, "audited": 2}  # updates from one to the next


class Clock(TrainerCallback):
    """The CPU seconds of the process at the end of each update."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.process_time())

    @property
    def per_update(self) -> float:
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


@dataclass(frozen=True)
class Cost:
    """The CPU seconds of an update on all processes, and its forward passes on each."""

    seconds: float
    passes: float


def cost(workload: Workload, settings: Mapping[str, Any], args: argparse.Namespace, seed: int) -> Cost:
    """Return the cost of an update of a run."""
    clock, rows = Clock(), workload.rows.select(range(args.updates * args.batch_size * args.k))
    with quiet(seed):
        result = ftaccum.test_fine_tuning(
            workload.new_model().to(DEVICE), train_data=rows, n_epochs=1, validation_split=0.0,
            batch_size=args.batch_size // args.processes, effective_batch_size=args.batch_size * args.k,
            callbacks=[clock], random_seed=seed, verbosity="quiet", **settings,
        )  # fmt: skip
        seconds = reduce(torch.tensor(clock.per_update, dtype=torch.float64), "sum").item()
    return Cost(seconds, result.passes_per_update)


def share_of_audits(n_updates: int, seconds: float) -> float:
    """Return the share of a run's time that `audit=True` takes, if one audit takes this many times an update."""
    schedule = AuditSchedule(True, n_updates)
    for update in range(1, n_updates + 1):
        if schedule.is_due(update) or schedule.may_take(is_new=False):
            schedule.done(seconds, is_planned=schedule.is_due(update))
        schedule.trained += 1
    return schedule.spent / schedule.trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="movies")
    parser.add_argument("--updates", type=int, default=9)
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a micro-batch, of all processes together")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--long", type=int, default=2000, help="updates of a long run")
    args = parser.parse_args()
    if args.processes > 1 and "RANK" not in os.environ:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.processes)]
        sys.exit(subprocess.run([sys.executable, *start, *sys.argv]).returncode)
    torch.set_num_threads(1)
    workload = WORKLOADS[args.workload](0)
    rounds: list[dict[str, Cost]] = []
    for seed in range(args.rounds):
        names = list(_RUNS) if seed % 2 else list(_RUNS)[::-1]
        rounds.append({name: cost(workload, _RUNS[name], args, seed) for name in names})
        if os.environ.get("RANK", "0") == "0":
            show(rounds, args)


def show(rounds: list[dict[str, Cost]], args: argparse.Namespace) -> None:
    """Print the costs of all rounds so far."""
    extra = {
        name: [every * (costs[name].seconds / costs["plain"].seconds - 1) for costs in rounds]
        for name, every in _EVERY.items()
    }
    plain, last = median(costs["plain"].seconds for costs in rounds), rounds[-1]
    print(f"{machine()}, {args.processes} process(es)")
    print(f"{args.workload}: updates of {args.batch_size} x {args.k} rows, {plain:.3f} CPU seconds each")
    for name, shares in extra.items():
        each = ", ".join(f"{share:.1%}" for share in shares)
        print(f"an update that is {name} takes {median(shares):.1%} more (rounds: {each})")
    print(f"forward passes in the last round: {last['plain'].passes:.2f}, {last['measured'].passes:.2f} if measured")
    noise = median(extra["measured"]) / AUTO_EVERY
    audits = share_of_audits(args.long, max(0.0, median(extra["audited"])))
    print(f"noise_scale='auto' takes {noise:.2%} more, audit=True {audits:.2%} in {args.long:,} updates")
    print(f"together {noise + audits:.2%}\n", flush=True)


if __name__ == "__main__":
    main()
