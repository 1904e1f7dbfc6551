"""Time the same updates with ftaccum, Transformers' Trainer, Accelerate's documented loop and a bare PyTorch loop.

All contenders have the same rows per update, initial weights, precision, AdamW, schedule and clipping. Each trains one
epoch over the same rows. A first round counts waits and padding without timing; the timed rounds then interleave the
contenders, in rotating order. Everything runs on one thread.

For all contenders, "seconds" run from the first forward pass in training mode to the return of the call (`train()`,
`test_fine_tuning`, or the loop's function). The column "before" has the time until then, with the weights already in
memory: it creates objects, reads lengths, collates the first rows and, in ftaccum, measures the loss. The two columns
add up to the whole call. No contender evaluates, saves or shows progress.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_trainer.py                                # both workloads
    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_trainer.py --k 32 --workload long-tailed  # windows of 256 rows
    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_trainer.py --sweep-k                      # time per row against k
    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_trainer.py --start-up
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import datasets
import torch
import transformers

from host_syncs import HostSyncs
from measuring import Passes, machine, now, quiet, short
from peers import CONTENDERS, NAMES, Contender, Job, fine_tune
from workloads import WORKLOADS, equal_lengths

TRAINERS = ("trainer", "trainer-group", "trainer-rebalance")
SWEEP_K, SWEEP_BATCH, SWEEP_LENGTH = (1, 4, 16, 64), 8, 256
# Code that reads tensors which stay on the host even with a GPU. On a CPU they cannot be recognised: ftaccum's batches
# before they are sent to the device, and AdamW's step count.
ON_HOST = ("ftaccum/data/", "torch/optim/adam.py")
# Places where the models themselves wait once or twice per forward pass, in every contender.
IN_MODEL = ("transformers/masking_utils.py", "transformers/models/")


@dataclass(frozen=True)
class Timing:
    """Seconds before the first forward pass of training, and from there to the end."""

    before: float
    seconds: float


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
    with quiet(job.seed):
        started = now()
        contender(model, job)
        ended = now()
    return Timing(first[0] - started, ended - first[0])


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
            _progress(f"{job.workload.name}, round {number + 1} of {rounds}, {name}: {times[name].seconds:.1f} s")
        timings.append(times)
    return counts, timings


def table(job: Job, counts: dict[str, Counts], timings: list[dict[str, Timing]]) -> Iterator[str]:
    """Yield a table of how fast each contender is relative to the others, as medians of the rounds' ratios."""
    medians = {name: median(times[name].seconds for times in timings) for name in counts}
    best = min((name for name in TRAINERS if name in medians), key=medians.__getitem__, default="")
    headings = [
        "", "seconds", "× as fast as `Trainer` (range)", f"as {NAMES.get(best, 'the best `Trainer`')}",
        "as the bare loop", "before, s", "padded per token", "passes", "waits an update, model's own",
    ]  # fmt: skip
    yield f"| {' | '.join(headings)} |\n|{' --- |' * len(headings)}"
    for name, count in counts.items():
        cells = [
            NAMES[name],
            f"{medians[name]:.2f}",
            f"{_ratio(timings, 'trainer', name)} ({_range(_ratios(timings, 'trainer', name))})",
            _ratio(timings, best, name),
            _ratio(timings, "bare", name),
            f"{median(times[name].before for times in timings):.2f}",
            f"{count.positions / count.tokens:.2f}",
            str(count.passes),
            f"{(count.waits - count.waits_in_model) / job.updates:.1f}, {count.waits_in_model / job.updates:.1f}",
        ]
        yield f"| {' | '.join(cells)} |"


def _ratios(timings: list[dict[str, Timing]], slower: str, name: str) -> list[float]:
    return [times[slower].seconds / times[name].seconds for times in timings if slower in times]


def _ratio(timings: list[dict[str, Timing]], slower: str, name: str) -> str:
    ratios = _ratios(timings, slower, name)
    return f"{median(ratios):.2f}" if ratios else "–"


def _range(values: list[float]) -> str:
    return f"{min(values):.2f}–{max(values):.2f}" if values else "–"


def bench(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in options.workload:
        job = _job(options, name)
        counts, timings = compare(job, options.contenders, options.rounds)
        print(f"\n{name}: {job.updates} updates of {job.batch_size} × {job.k} rows, longest {job.longest} tokens\n")
        print("\n".join(table(job, counts, timings)))
        found[name] = {
            "counts": {n: asdict(count) for n, count in counts.items()},
            "timings": [{n: asdict(timing) for n, timing in times.items()} for times in timings],
        }
    return found


def sweep_k(options: argparse.Namespace) -> dict[str, Any]:
    """Measure training time per row, for ftaccum and the bare loop, with the same rows in fewer and fewer updates."""
    workload = equal_lengths(options.seed, SWEEP_LENGTH)
    rows = workload.rows.select(range(SWEEP_BATCH * max(SWEEP_K)))
    jobs = {k: Job(workload, rows, SWEEP_BATCH, k, options.seed, options.precision) for k in SWEEP_K}
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
        workload = WORKLOADS[name](options.seed)
        job = Job(workload, workload.rows, *_sizes(options), options.seed, options.precision)
        # Enough validation rows for one forward pass: the time for more is not part of starting up.
        validation = {"without validation": {}, "with validation": {"val_data": job.rows.select(range(job.batch_size))}}
        for number in range(options.rounds + 1):
            for kind, given in validation.items():
                seconds = _until_first_pass(job, given)
                if number:  # the first round is a warm-up
                    found.setdefault(f"{name}, {len(job.rows)} rows, {kind}", []).append(seconds)
    print("\n| until the first forward pass of training | seconds | range |\n| --- | --- | --- |")
    for label, times in found.items():
        print(f"| {label} | {median(times):.2f} | {_range(times)} |")
    return {"start_up": found}


class _Begun(Exception):  # noqa: N818
    """Training has begun."""


def _until_first_pass(job: Job, given: dict[str, Any]) -> float:
    def begun() -> None:
        raise _Begun

    model = job.workload.new_model()
    Passes(model, begun)
    with quiet(job.seed):
        started = now()
        with contextlib.suppress(_Begun):
            fine_tune(model, job, **given)
        return now() - started


def _job(options: argparse.Namespace, name: str) -> Job:
    workload = WORKLOADS[name](options.seed)
    batch_size, k = _sizes(options)
    n_rows = (options.updates or workload.updates) * batch_size * k
    if n_rows > len(workload.rows):
        sys.exit(
            f"{name} has {len(workload.rows)} rows, but {n_rows} are needed. Lower --updates, --k or --batch-size."
        )
    return Job(workload, workload.rows.select(range(n_rows)), batch_size, k, options.seed, options.precision)


def _sizes(options: argparse.Namespace) -> tuple[int, int]:
    return options.batch_size, options.k


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, help="updates per contender and round (default: set by the workload)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per micro-batch")
    parser.add_argument("--k", type=int, default=8, help="micro-batches per update")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write all figures to")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--sweep-k", action="store_true", help="measure the time per row for several k instead")
    instead.add_argument("--start-up", action="store_true", help="measure the time until training begins instead")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    print(machine())
    run = sweep_k if options.sweep_k else start_up if options.start_up else bench
    found = run(options)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
