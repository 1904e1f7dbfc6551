"""Measure the cost of checkpoints, and how long a run takes to resume from one.

Saving: MiniLM on film reviews, as in the quickstart, with a checkpoint every 50 updates and without checkpoints. The
runs are interleaved in rounds, in rotating order. Seconds are those of training, including all that saving adds: the
time for which training waits, and the time that the writing thread takes from it. Everything except that thread runs on
one thread.

Resuming: a tiny model on 100,000 rows in updates of 4 × 4, so that update 10,000 is in the second epoch. ftaccum and
Transformers' Trainer each train up to there once and keep their own checkpoint. The benchmark times what follows, from
the call that resumes to the end of the first new update, with the weights already in memory.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_checkpoints.py            # both
    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_checkpoints.py --only saving --every 10
    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_checkpoints.py --only resuming --position 1000
"""

import argparse
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ftaccum import test_fine_tuning
from ftaccum.checkpoint.manager import CheckpointManager
from ftaccum.checkpoint.writer import CheckpointWriter
from measuring import DEVICE, machine, now, quiet
from workloads import Row, Workload, movies

BATCH, K = 8, 4  # as in the quickstart
COSTS = (64.0, 1.0, 0.0005)  # so that all contenders split windows in the same way
N_ROWS, LONGEST, VOCABULARY = 100_000, 24, 100
SLOW = 0.001  # seconds to make a row
SAVING = ("no folder", "a folder", "checkpoints")


@dataclass
class Saves:
    """Seconds and bytes of each save."""

    held_up: list[float] = field(default_factory=list)
    written: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        save, write = CheckpointManager.save, CheckpointWriter._write

        def timed_save(checkpoint_manager: Any, *arguments: Any) -> None:
            started = now()
            save(checkpoint_manager, *arguments)
            self.held_up.append(now() - started)

        def timed_write(writer: Any, snapshot: Any, place: Path, *arguments: Any) -> None:
            started = time.perf_counter()
            write(writer, snapshot, place, *arguments)
            self.written.append(time.perf_counter() - started)
            self.sizes.append(sum(path.stat().st_size for path in place.rglob("*") if path.is_file()))

        with (
            patch.object(CheckpointManager, "save", timed_save),
            patch.object(CheckpointWriter, "_write", timed_write),
        ):
            yield


def saving(options: argparse.Namespace) -> None:
    """Print the cost of checkpoints."""
    workload, seconds = movies(options.seed), dict[str, list[float]]()
    saves = Saves()
    for number in range(options.rounds):
        first = number % len(SAVING)
        for name in [*SAVING[first:], *SAVING[:first]]:
            seconds.setdefault(name, []).append(_training_seconds(workload, name, options, saves))
            _progress(f"round {number + 1} of {options.rounds}, {name}: {seconds[name][-1]:.1f} s")
    print(f"\n{options.updates} updates of {BATCH} × {K} reviews, a checkpoint every {options.every}:\n")
    print("| what is saved | seconds of training | relative to no folder (range) |\n| --- | --- | --- |")
    for name, times in seconds.items():
        ratios = [one / other for one, other in zip(times, seconds["no folder"], strict=True)]
        cells = [name, f"{median(times):.1f}", f"{_percent(median(ratios))} ({_percents(ratios)})"]
        print(f"| {' | '.join(cells)} |")
    held_up = f"{1000 * median(saves.held_up):.0f} ms (at most {1000 * max(saves.held_up):.0f})"
    print(f"\nA checkpoint of {median(saves.sizes) / 1e6:.0f} MB delays training by {held_up}, ", end="")
    print(f"and is written in {median(saves.written):.1f} s.")


def _training_seconds(workload: Workload, name: str, options: argparse.Namespace, saves: Saves) -> float:
    """Return the training seconds of one run, without the checkpoint at the end of the epoch."""
    model, rows = workload.new_model(), workload.rows.select(range(options.updates * BATCH * K))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        given: dict[str, Any] = {} if name == "no folder" else {"output_dir": folder, "checkpoint_every": None}
        if name == "checkpoints":
            given["checkpoint_every"] = options.every
            stack.enter_context(saves.watched())
        with quiet(options.seed):
            result = test_fine_tuning(
                model, train_data=rows, validation_split=0.0, n_epochs=1, batch_size=BATCH,
                gradient_accumulation_steps=K, planner_costs=COSTS, progress=False, **given,
            )  # fmt: skip
    return len(rows) / result.samples_per_second


class MadeRows(torch.utils.data.Dataset[Row]):
    """Rows that are slow to make.

    Attributes:
        seconds: seconds to make one row.
    """

    def __init__(self, rows: datasets.Dataset) -> None:
        self.seconds = 0.0
        self._rows = rows.to_list()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        if self.seconds:
            time.sleep(self.seconds)
        return self._rows[index]


class _EnoughError(BaseException):
    """Ends a run early. It is not an `Exception`, because a run saves itself before it raises one."""


@dataclass(frozen=True)
class Resumed:
    """One contender on one kind of rows, which trains up to a position and then resumes there."""

    train: Callable[[Any, Path, int, bool], None]  # rows, folder, position, whether to resume
    rows: Any
    folder: Path
    position: int

    def prepare(self) -> None:
        """Train until the checkpoint at the position exists."""
        with quiet(0), contextlib.suppress(_EnoughError):
            self.train(self.rows, self.folder, self.position, False)

    def seconds(self) -> float:
        """Return the seconds from the call that resumes to the end of the first new update."""
        ended: list[float] = []

        def end(*_: Any) -> None:
            ended.append(now())
            raise _EnoughError

        hook = register_optimizer_step_post_hook(end)
        try:
            with quiet(0), contextlib.suppress(_EnoughError):
                started = now()
                self.train(self.rows, self.folder, self.position, True)
        finally:
            hook.remove()
        return ended[0] - started


def with_ftaccum(rows: Any, folder: Path, position: int, goes_on: bool) -> None:
    model, there = tiny(), folder / "checkpoints" / f"update-{position:08d}"

    def enough(module: Any, *_: Any) -> None:
        if module.training and not goes_on and there.exists():
            raise _EnoughError

    model.register_forward_pre_hook(enough)
    test_fine_tuning(
        model, train_data=rows, validation_split=0.0, n_epochs=3, batch_size=4, gradient_accumulation_steps=4,
        data_collator=collated, output_dir=str(folder), checkpoint_every=position, progress=False,
        resume=str(there) if goes_on else None,
    )  # fmt: skip


def with_trainer(rows: Any, folder: Path, position: int, goes_on: bool) -> None:
    class Enough(TrainerCallback):
        def on_save(self, *_: Any, **__: Any) -> None:
            raise _EnoughError

    arguments = TrainingArguments(
        str(folder), num_train_epochs=3, per_device_train_batch_size=4, gradient_accumulation_steps=4,
        save_steps=position, logging_steps=1000, report_to=[], disable_tqdm=True, use_cpu=DEVICE.type == "cpu",
    )  # fmt: skip
    trainer = Trainer(tiny(), arguments, train_dataset=rows, data_collator=collated, callbacks=[Enough()])
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{position}") if goes_on else None)


def resuming(options: argparse.Namespace) -> None:
    """Print how long runs take to resume."""
    table = datasets.Dataset.from_list([row(n) for n in range(N_ROWS)])
    made = MadeRows(table)
    kinds: dict[str, Any] = {"a `datasets.Dataset`": table}
    if not options.quick:
        kinds["rows that take 1 ms each"] = made
    contenders = {"ftaccum": with_ftaccum, "`Trainer`": with_trainer}
    folder = Path(tempfile.mkdtemp())
    runs = {
        (kind, name): Resumed(train, rows, folder / f"{name.strip('`')}-{n}", options.position)
        for n, (kind, rows) in enumerate(kinds.items())
        for name, train in contenders.items()
    }
    for (kind, name), run in runs.items():
        _progress(f"{name} trains {options.position} updates on {kind}")
        run.prepare()
    made.seconds = SLOW
    seconds = {key: list[float]() for key in runs}
    for number in range(options.rounds):
        for key in sorted(runs, reverse=number % 2 == 1):
            seconds[key].append(runs[key].seconds())
            _progress(f"round {number + 1} of {options.rounds}, {key[1]} on {key[0]}: {seconds[key][-1]:.2f} s")
    shutil.rmtree(folder)
    print(f"\nSeconds to the end of the first update after update {options.position}, of {N_ROWS} rows (range):\n")
    print(f"| rows | {' | '.join(contenders)} |\n| --- |{' --- |' * len(contenders)}")
    for kind in kinds:
        print(f"| {kind} | {' | '.join(_seconds(seconds[kind, name]) for name in contenders)} |")


def collated(rows: Sequence[Row]) -> dict[str, Tensor]:
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def row(index: int) -> Row:
    draw = random.Random(index)
    return {"input_ids": draw.choices(range(1, VOCABULARY), k=draw.randint(4, LONGEST)), "labels": index % 2}


def tiny() -> Any:
    set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LONGEST, **sizes))


def _percent(ratio: float) -> str:
    return f"{ratio - 1:+.1%}"


def _percents(ratios: Sequence[float]) -> str:
    return f"{_percent(min(ratios))} to {_percent(max(ratios))}"


def _seconds(times: Sequence[float]) -> str:
    return f"{median(times):.2f} ({min(times):.2f}–{max(times):.2f})"


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


PARTS = {"saving": saving, "resuming": resuming}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="run only one of the two parts")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default 5)")
    parser.add_argument("--updates", type=int, default=150, help="updates of each run of the saving part (default 150)")
    parser.add_argument("--every", type=int, default=50, help="updates between checkpoints (default 50)")
    parser.add_argument("--position", type=int, default=10_000, help="the update to resume after (default 10000)")
    parser.add_argument(
        "--quick", action="store_true", help="resume with only one kind of rows, which halves the training"
    )
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    print(machine())
    for name, part in PARTS.items():
        if options.only in (None, name):
            part(options)


if __name__ == "__main__":
    main()
