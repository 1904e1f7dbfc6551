"""Time the same updates with ftaccum, Transformers' Trainer, TRL's SFTTrainer, Accelerate's loop and bare PyTorch.

All contenders have the same rows per update, initial weights, precision, AdamW, schedule and clipping. Each trains one
epoch over the same rows. A first round counts waits and padding without timing; the timed rounds then interleave the
contenders, in rotating order. Everything runs on one thread. A contender that does not fit a workload is left out.

- The whole call runs from before the trainer is made to the return of `train()`, `test_fine_tuning` or the loop, with
  the weights and the tokenized rows already in memory. It includes the self-check, reading lengths and packing.
- The steady state runs from the end of the first update's optimizer step to the end of the last one's, and is divided
  by the number of updates after the first. It includes ftaccum's audits. The second table has their share, and the
  seconds before the first forward pass of training, which include the self-check and the first audit.
- Peak memory is that of one run in a process of its own: on a CPU, how much resident memory grows at most beyond the
  loaded weights, and on a GPU the allocator's peak.

No contender evaluates, saves or shows progress. scripts/compare_embeddings.py compares time and memory with
sentence-transformers, whose trainer needs a window loss.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_trainer.py                                # all but chat
    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_trainer.py --workload chat \\
        --contenders trainer trainer-rebalance sft sft-packed bare ours                        # an hour or two
    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_trainer.py --k 32 --workload long-tailed  # windows of 256 rows
    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_trainer.py --sweep-k                      # time per row against k
    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_trainer.py --start-up
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import datasets
import torch
import transformers

import trainer_tables
from jobs import Job
from measuring import Passes, machine, now, quiet
from partly_labelled import PARTLY_LABELLED
from peers import CONTENDERS, NAMES, fine_tune, why_left_out
from trainer_runs import Counts, RecordedChecks, Timing, counted, grown, timed
from workloads import WORKLOADS, Workload, equal_lengths

SWEEP_K, SWEEP_BATCH, SWEEP_LENGTH = (1, 4, 16, 64), 8, 256
ALL = WORKLOADS | PARTLY_LABELLED
SLOW = ("chat",)


def compare(job: Job, names: Sequence[str], rounds: int) -> tuple[dict[str, Counts], list[dict[str, Timing]]]:
    counts = {}
    for name in names:
        counts[name] = counted(CONTENDERS[name], job)
        _progress(f"{job.workload.name}, counting {name}: {counts[name].passes} passes, {counts[name].waits} waits")
    timings = []
    for number in range(rounds):
        first = number % len(names)
        times = {}
        for name in [*names[first:], *names[:first]]:
            times[name] = timed(CONTENDERS[name], job)
            _progress(f"{job.workload.name}, round {number + 1} of {rounds}, {name}: {times[name]}")
        timings.append(times)
    return counts, timings


def bench(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in options.workload:
        job = _job(options, name)
        names = _fitting(options.contenders, job)
        counts, rounds = compare(job, names, options.rounds)
        sizes = f"{job.updates} updates of {job.batch_size} × {job.k} rows, longest {job.longest} tokens"
        print(f"\n{name}: {sizes}, precision {job.precision}\n")
        print("\n".join(trainer_tables.times(rounds)), end="\n\n", flush=True)
        peaks = {} if options.no_memory else {contender: _peak(name, contender) for contender in names}
        print("\n".join(trainer_tables.details(job, counts, rounds, peaks)), flush=True)
        found[name] = {
            "counts": {n: asdict(count) for n, count in counts.items()},
            "timings": [{n: asdict(timing) for n, timing in times.items()} for times in rounds],
            "peaks": peaks,
        }
    return found


def _fitting(names: Sequence[str], job: Job) -> list[str]:
    """Return the contenders that fit a workload, and print why the others do not."""
    reasons = {name: why_left_out(name, job.workload) for name in names}
    for name, reason in reasons.items():
        if reason:
            print(f"{job.workload.name} without {NAMES[name]}: {reason}.")
    return [name for name, reason in reasons.items() if not reason]


def _peak(workload: str, contender: str) -> int:
    """Return the bytes by which memory grows in a run, in a new process with the arguments of this one."""
    command = [sys.executable, *sys.argv, "--workload", workload, "--peak-of", contender]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    _progress(f"{workload}, memory of {contender}: {int(printed.split()[-1]) / 1e6:.0f} MB")
    return int(printed.split()[-1])


def print_peak(options: argparse.Namespace) -> None:
    print(grown(CONTENDERS[options.peak_of], _job(options, options.workload[0])))


def sweep_k(options: argparse.Namespace) -> dict[str, Any]:
    """Measure training time per row, for ftaccum and the bare loop, with the same rows in fewer and fewer updates."""
    workload = equal_lengths(options.seed, SWEEP_LENGTH)
    rows = workload.rows.select(range(SWEEP_BATCH * max(SWEEP_K)))
    jobs = {
        k: Job(workload, rows, SWEEP_BATCH, k, options.seed, options.precision or workload.precision) for k in SWEEP_K
    }
    names = ("ours-arrival", "bare")
    for name in names:
        timed(CONTENDERS[name], replace(jobs[1], rows=rows.select(range(4 * SWEEP_BATCH))))
    found: dict[str, dict[int, list[float]]] = {name: {k: [] for k in SWEEP_K} for name in names}
    for number in range(options.rounds):
        first = number % len(SWEEP_K)
        for k in [*SWEEP_K[first:], *SWEEP_K[:first]]:
            for name in names:
                found[name][k].append(1000 * timed(CONTENDERS[name], jobs[k]).seconds / len(rows))
                _progress(f"round {number + 1} of {options.rounds}, k = {k}, {name}: {found[name][k][-1]:.2f} ms a row")
    print(f"\n{len(rows)} rows of {SWEEP_LENGTH} tokens, {SWEEP_BATCH} per micro-batch: milliseconds per row\n")
    print(f"| k | {' | '.join(f'{NAMES[name]} | against k = 1' for name in names)} |\n| --- |" + " --- |" * 4)
    for k in SWEEP_K:
        ms = {name: median(found[name][k]) for name in names}
        cells = (f"{ms[name]:.2f} | {ms[name] / median(found[name][1]) - 1:+.1%}" for name in names)
        print(f"| {k} | {' | '.join(cells)} |")
    return {"ms_per_row": found}


def start_up(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the seconds from the call of `test_fine_tuning` on all rows to the first forward pass of training."""
    found: dict[str, list[float]] = {}
    for name in options.workload:
        workload = ALL[name](options.seed)
        job = Job(workload, workload.rows, **_setting(options, workload))
        # Enough validation rows for one forward pass: the time for more is not part of starting up.
        validation = {"without validation": {}, "with validation": {"val_data": job.rows.select(range(job.batch_size))}}
        for number in range(options.rounds + 1):
            for kind, given in validation.items():
                seconds = _until_first_pass(job, given)
                if number:  # the first round is a warm-up
                    found.setdefault(f"{name}, {len(job.rows)} rows, {kind}", []).append(seconds)
    print("\n| until the first forward pass of training | seconds | range |\n| --- | --- | --- |")
    for label, times in found.items():
        print(f"| {label} | {median(times):.2f} | {trainer_tables.extent(times)} |")
    return {"start_up": found}


class _Begun(Exception):  # noqa: N818
    """Training has begun."""


def _until_first_pass(job: Job, given: dict[str, Any]) -> float:
    def begun() -> None:
        raise _Begun

    model = job.workload.new_model()
    with quiet(job.seed), RecordedChecks(Passes(model, begun)):
        started = now()
        with contextlib.suppress(_Begun):
            fine_tune(model, job, **given)
        return now() - started


def _job(options: argparse.Namespace, name: str) -> Job:
    workload = ALL[name](options.seed)
    setting = _setting(options, workload)
    n_rows = (options.updates or workload.updates) * setting["batch_size"] * setting["k"]
    if n_rows > len(workload.rows):
        sys.exit(
            f"{name} has {len(workload.rows)} rows, but {n_rows} are needed. Lower --updates, --k or --batch-size."
        )
    return Job(workload, workload.rows.select(range(n_rows)), **setting)


def _setting(options: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    names = ("batch_size", "k", "precision")
    given = {name: getattr(options, name) or getattr(workload, name) for name in names}
    return {**given, "seed": options.seed}


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workload", nargs="+", choices=ALL, default=[name for name in ALL if name not in SLOW])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, help="updates per contender and round (default: set by the workload)")
    parser.add_argument("--batch-size", type=int, help="rows per micro-batch (default: set by the workload)")
    parser.add_argument("--k", type=int, help="micro-batches per update (default: set by the workload)")
    parser.add_argument("--precision", choices=("no", "bf16"), help="(default: set by the workload)")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write all figures to")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--sweep-k", action="store_true", help="measure the time per row for several k instead")
    instead.add_argument("--start-up", action="store_true", help="measure the time until training begins instead")
    instead.add_argument("--peak-of", choices=CONTENDERS, help="print the growth of memory, in bytes, instead")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if options.peak_of:
        print_peak(options)
        return
    print(machine())
    run = sweep_k if options.sweep_k else start_up if options.start_up else bench
    found = run(options)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
