"""Measure the cost of the gradient noise scale, in CPU seconds per update.

    .venv/bin/python scripts/bench_noise_scale.py
    .venv/bin/python scripts/bench_noise_scale.py --workload long-tailed --k 8 --updates 6 --rounds 5

Runs with and without measurements alternate. They train on the same rows from the same weights, without audits, and the
first update does not count. With noise_scale=1 every update is measured; "auto" measures every tenth.
"""

import argparse
import time
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

import ftaccum
from measuring import DEVICE, machine, quiet
from workloads import WORKLOADS, Workload

_EVERY = 10  # updates of "auto" from one measurement to the next


class Clock(TrainerCallback):
    """The CPU seconds of the process at the end of each update."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.process_time())

    @property
    def per_update(self) -> float:
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def seconds_per_update(workload: Workload, noise_scale: Any, args: argparse.Namespace, seed: int) -> tuple[float, Any]:
    """Return the CPU seconds of an update, and the result of the run."""
    clock, rows = Clock(), workload.rows.select(range(args.updates * args.batch_size * args.k))
    with quiet(seed):
        result = ftaccum.test_fine_tuning(
            workload.new_model().to(DEVICE), train_data=rows, n_epochs=1, validation_split=0.0,
            batch_size=args.batch_size, gradient_accumulation_steps=args.k, audit=False, noise_scale=noise_scale,
            callbacks=[clock], random_seed=seed, verbosity="quiet",
        )  # fmt: skip
    return clock.per_update, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="movies")
    parser.add_argument("--updates", type=int, default=9)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    workload, extra, plain, passes = WORKLOADS[args.workload](0), [], [], (0.0, 0.0)
    for seed in range(args.rounds):
        order = (False, 1) if seed % 2 else (1, False)
        runs = {bool(setting): seconds_per_update(workload, setting, args, seed) for setting in order}
        (without, one), (measured, other) = runs[False], runs[True]
        plain.append(without)
        extra.append(measured / without - 1)
        passes = one.passes_per_update, other.passes_per_update
    print(machine())
    print(f"{args.workload}: updates of {args.batch_size} x {args.k} rows, {median(plain):.3f} CPU seconds each")
    shares = ", ".join(f"{share:.1%}" for share in extra)
    print(f"a measured update takes {median(extra):.1%} more (rounds: {shares})")
    print(f"forward passes in the last round: {passes[0]:.2f} per update, {passes[1]:.2f} if measured")
    print(f"noise_scale='auto' takes {median(extra) / _EVERY:.2%} more")


if __name__ == "__main__":
    main()
