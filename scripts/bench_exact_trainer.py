"""Time Transformers' Trainer and `exact(Trainer)` on the same updates of the packaged MiniLM on film reviews.

Rounds interleave the contenders in rotating order, on one thread. "start" runs from the call of `train()` to the first
step, and includes the measurement of the loss; "training" from there to the end, and includes audits. The script prints
medians of the rounds' ratios to the unchanged Trainer, of wall time and of the time that the process computed, which
other processes disturb less.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_exact_trainer.py --rounds 5 --updates 60
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import datasets
import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from ftaccum import exact
from measuring import machine, quiet
from workloads import WORKLOADS

CONTENDERS = {
    "`Trainer`": Trainer,
    "`exact(Trainer)`, no audits": exact(Trainer, audit=False),
    "`exact(Trainer)`": exact(Trainer),
    "`exact(Trainer)`, `planner=True`": exact(Trainer, planner=True),
}
Clocks = tuple[float, float]  # wall time, and time computed


def now() -> Clocks:
    return time.perf_counter(), time.process_time()


class FirstStep(TrainerCallback):
    """The time of the first step."""

    at: Clocks | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.at = self.at or now()


def timed(trainer_class: Any, workload: Any, rows: Any, options: argparse.Namespace) -> tuple[Clocks, Clocks]:
    """Return the times until the first step, and from there to the end."""
    first = FirstStep()
    with tempfile.TemporaryDirectory() as folder, quiet(options.seed):
        arguments = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.k, optim="adamw_torch_fused", seed=options.seed, save_strategy="no",
            report_to=[], disable_tqdm=True, use_cpu=not torch.accelerator.is_available(), logging_steps=10,
        )  # fmt: skip
        trainer = trainer_class(
            workload.new_model(), arguments, train_dataset=rows, data_collator=workload.collate, callbacks=[first]
        )
        begun = now()
        trainer.train()
        ended = now()
    assert first.at is not None
    return _between(begun, first.at), _between(first.at, ended)


def _between(one: Clocks, other: Clocks) -> Clocks:
    return other[0] - one[0], other[1] - one[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in (("rounds", 5), ("updates", 60), ("batch-size", 8), ("k", 4), ("seed", 42)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    workload = WORKLOADS["movies"](options.seed)
    rows = workload.rows.select(range(options.updates * options.batch_size * options.k))
    names = list(CONTENDERS)
    found: dict[str, list[tuple[Clocks, Clocks]]] = {name: [] for name in names}
    for number in range(options.rounds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            found[name].append(timed(CONTENDERS[name], workload, rows, options))
            print(f"round {number + 1}, {name}: {found[name][-1][1][0]:.1f} s", file=sys.stderr, flush=True)
    print(f"{machine()}\n\n{options.updates} updates of {options.batch_size} × {options.k} rows\n")
    print("| | start, s | training, s | training, to `Trainer` | computed, to `Trainer` |\n|" + " --- |" * 5)
    unchanged = found[names[0]]
    for name, rounds in found.items():
        start, training = (median(each[n][0] for each in rounds) for n in (0, 1))
        ratios = [
            median(each[1][clock] / other[1][clock] for each, other in zip(rounds, unchanged, strict=True))
            for clock in (0, 1)
        ]
        print(f"| {name} | {start:.2f} | {training:.2f} | {ratios[0]:.3f} | {ratios[1]:.3f} |")


if __name__ == "__main__":
    main()
