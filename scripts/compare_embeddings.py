"""Compare contrastive training over a whole update with sentence-transformers, and with negatives of a micro-batch.

All contenders fine-tune the packaged encoder as a reverse dictionary (see recipes/embeddings.py), on the same rows in
the same updates, with the same AdamW, schedule and clipping, in float32, without dropout and on one thread:

- window: ftaccum with `loss_over="window"`;
- window-unaudited: the same without audits, which sentence-transformers has not either;
- window-unplanned: the same without the planner, so that rows of unequal length are padded as in those that follow;
- items: ftaccum with ordinary accumulation, where a text is compared with the pairs of its micro-batch;
- cached: sentence-transformers with `CachedMultipleNegativesRankingLoss`, installed into `.venv-peers` on first use;
- untuned: the metrics before training.

Each run is a process of its own. The rounds interleave the contenders, in rotating order. The figures of a run are
printed and added to `--results` as soon as it ends, so that nothing is lost if the comparison is interrupted.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/compare_embeddings.py --updates 30 --rounds 3
    .venv/bin/python scripts/compare_embeddings.py --table                # the runs in `--results` again
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModel, AutoTokenizer, EvalPrediction

import packaged
from embeddings import PairEncoder, encode, retrieval
from embeddings_task import Clock, Outcome, Task, memory, without_dropout
from ftaccum import ModelAndDataOptions, plan, test_fine_tuning
from ftaccum.data.columns import ColumnRules
from ftaccum.data.padding import PaddingCollator
from ftaccum.losses import MultipleNegativesRankingLoss
from measuring import machine

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / ".venv-peers"
PEER_PACKAGE = "sentence-transformers[train]==6.2.0"
SIDES = ("definition", "word")
COLUMNS = (
    "", "seconds per update (range)", "CPU seconds per update (range)", "time / cached", "CPU time / cached",
    "peak memory, MB", "of it in training, MB", "recall@1", "recall@10", "MRR", "largest difference of losses",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """The figures of a contender in a round.

    Attributes:
        losses: the loss of each update, before its step.
        seconds, cpu_seconds: the medians over the updates from the second on; NaN without such updates.
        peak, training: resident memory in bytes at most, and how much of it came with training.
        metrics: of the held-out pairs.
    """

    contender: str
    round: int
    losses: list[float]
    seconds: float
    cpu_seconds: float
    peak: int
    training: int
    metrics: dict[str, float]

    @classmethod
    def of(cls, contender: str, number: int, outcome: Outcome) -> "Run":
        seconds, cpu_seconds = (median(x) if x else float("nan") for x in (outcome.seconds, outcome.cpu_seconds))
        anchors, positives = map(np.asarray, outcome.held_out)
        metrics = retrieval(EvalPrediction((anchors, positives), np.arange(len(anchors))))
        training = outcome.peak - outcome.before
        return cls(contender, number, outcome.losses, seconds, cpu_seconds, outcome.peak, training, metrics)


def n_rows(batch: Any) -> int:
    return len(batch["labels"])


OURS: dict[str, dict[str, Any]] = {
    "window": {"loss_over": "window"},
    "window-unaudited": {"loss_over": "window", "audit": False},
    "window-unplanned": {"loss_over": "window", "audit": False, "planner": False},
    "items": {"loss_over": "items", "planner": False, "audit": False, "count_items": n_rows},
    "untuned": {},
}


def tokenized(pairs: list[tuple[str, str]], tokenizer: Any, max_length: int) -> Dataset:
    sides = zip(*pairs, strict=True)
    return encode(Dataset.from_dict(dict(zip(SIDES, sides, strict=True))), tokenizer, *SIDES, max_length=max_length)


@torch.no_grad()
def embed(model: PairEncoder, rows: Dataset, collate: PaddingCollator, batch_size: int) -> list[list[list[float]]]:
    model.eval()
    found = []
    for part in rows.iter(batch_size):
        batch = collate([dict(zip(part, values, strict=True)) for values in zip(*part.values(), strict=True)])
        batch = {name: values for name, values in batch.items() if name.endswith(("input_ids", "attention_mask"))}
        found.append(model(**batch))
    return [torch.cat([part[side] for part in found]).tolist() for side in ("anchor", "positive")]


def train_ours(task: Task, options: dict[str, Any]) -> Outcome:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    train, val = (tokenized(pairs, tokenizer, task.max_length) for pairs in (task.train, task.val))
    collate = PaddingCollator(ColumnRules(), pad_token_id=tokenizer.pad_token_id)
    model, clock = PairEncoder(AutoModel.from_pretrained(task.model)), Clock()
    without_dropout(model)
    before = memory().now
    losses: list[float] = []
    if options:  # none: leave the model untuned
        result = test_fine_tuning(
            model, train_data=train, validation_split=0.0, n_epochs=1, batch_size=task.batch_size,
            effective_batch_size=task.effective_batch_size, tokenizer=tokenizer, learning_rate=task.learning_rate,
            warmup_steps=task.warmup_steps, weight_decay=task.weight_decay, gradient_clip_norm=task.clip,
            random_seed=task.seed, loss_fn=MultipleNegativesRankingLoss(scale=task.scale), callbacks=[clock],
            progress=False, verbosity="quiet", **options,
        )  # fmt: skip
        losses = result.loss_history
    peak = memory().peak
    held_out = embed(model, val, collate, task.batch_size)
    return Outcome(losses, clock.seconds(), clock.cpu_seconds(), before, peak, held_out)


def read_pairs(path: Path, limit: int) -> Dataset:
    return ModelAndDataOptions(train_data=str(path), max_train_rows=limit).read(SIDES)["train_data"]


def make_task(updates: int, n_val: int, seed: int) -> Task:
    packaged.prepare(packaged.MINILM, packaged.WORDS_TRAIN)
    sizes: dict[str, Any] = {"batch_size": 16, "effective_batch_size": 512}
    train, val = (
        [(row[SIDES[0]], row[SIDES[1]]) for row in read_pairs(path, limit)]
        for path, limit in ((packaged.WORDS_TRAIN, updates * 512), (packaged.WORDS_VAL, n_val))
    )
    planned = plan(len(train), validation_split=0.0, n_epochs=1, random_seed=seed, **sizes)
    return Task(
        str(packaged.MINILM), train, val, [list(map(int, window.rows)) for window in planned.windows(0)], **sizes,
        max_length=64, learning_rate=1e-4, warmup_steps=max(1, updates // 10), weight_decay=0.01, clip=1.0, scale=20.0,
        seed=seed,
    )  # fmt: skip


def install_peer() -> str:
    """Return the Python that has sentence-transformers. Install it where it is missing."""
    python = PEERS / "bin" / "python"
    if not (PEERS / "installed").exists():
        print("Installing sentence-transformers into .venv-peers (a few minutes, once) …", file=sys.stderr)
        constraints = HERE.parent / "constraints.txt"
        torch_version = next(line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
        subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
        for package in (torch_version, PEER_PACKAGE):
            command = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(constraints), package]
            subprocess.run(command, check=True)
        (PEERS / "installed").touch()
    return str(python)


def run(contender: str, task_file: Path, folder: Path) -> Outcome:
    """Run a contender in a process of its own."""
    result = folder / "result.json"
    if contender == "cached":
        command, environment = [install_peer(), str(HERE / "embeddings_peer.py")], {**os.environ, "PYTHONPATH": ""}
    else:
        command, environment = [sys.executable, __file__, "--contender", contender], dict(os.environ)
    subprocess.run([*command, str(task_file), str(result)], check=True, env=environment, stdout=subprocess.DEVNULL)
    return Outcome(**json.loads(result.read_text()))


def table(runs: list[Run]) -> list[str]:
    """Return the lines of a table. Times and losses are compared with those of `cached` in the same round."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    peers = {run.round: run for run in runs if run.contender == "cached"}
    for name in dict.fromkeys(run.contender for run in runs):
        own = [run for run in runs if run.contender == name]
        pairs = [(run, peers[run.round]) for run in own if run.losses and run.round in peers]
        differences = [np.abs(np.subtract(run.losses, peer.losses)).max() for run, peer in pairs]
        cells = [
            spread([run.seconds for run in own]),
            spread([run.cpu_seconds for run in own]),
            spread([run.seconds / peer.seconds for run, peer in pairs]),
            spread([run.cpu_seconds / peer.cpu_seconds for run, peer in pairs]),
            *(f"{max(values) / 1e6:.0f}" for values in ([run.peak for run in own], [run.training for run in own])),
            *(f"{value:.3f}" for value in own[0].metrics.values()),
            f"{max(differences):.1e}" if differences else "–",
        ]
        lines.append(f"| {' | '.join((name, *cells))} |")
    return lines


def spread(values: list[float]) -> str:
    """Return the median, and the range if there are several values."""
    known = [value for value in values if value == value]
    extent = f" ({min(known):.2f}–{max(known):.2f})" if len(known) > 1 else ""
    return f"{median(known):.2f}{extent}" if known else "–"


def compare(given: argparse.Namespace) -> list[Run]:
    rounds = [
        (n + 1, [given.only[(n + k) % len(given.only)] for k in range(len(given.only))]) for n in range(given.rounds)
    ]
    runs = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        task_file = folder / "task.json"
        task_file.write_text(json.dumps(asdict(make_task(given.updates, given.held_out, given.seed))))
        given.results.parent.mkdir(parents=True, exist_ok=True)
        for number, contenders in [(0, ["untuned"]), *rounds]:
            for contender in contenders:
                runs.append(Run.of(contender, number, run(contender, task_file, folder)))
                line = json.dumps(asdict(runs[-1]))
                print(line, flush=True)
                with given.results.open("a") as file:
                    print(line, file=file)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    contenders = [*(name for name in OURS if name != "untuned"), "cached"]
    parser.add_argument("--only", nargs="+", choices=contenders, default=contenders)
    parser.add_argument("--results", type=Path, default=HERE.parent / "outputs" / "compare_embeddings.jsonl")
    parser.add_argument("--table", action="store_true", help="print the table of the runs in `--results`, without runs")
    given = parser.parse_args()
    if given.table:
        runs = [Run(**json.loads(line)) for line in given.results.read_text().splitlines()]
    elif given.results.exists():
        parser.error(f"{given.results} has the figures of another comparison. Move it, or name a new file.")
    else:
        runs = compare(given)
    print(f"\n{machine()}\n", *table(runs), sep="\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contender"]:
        outcome = train_ours(Task(**json.loads(Path(sys.argv[3]).read_text())), OURS[sys.argv[2]])
        Path(sys.argv[4]).write_text(json.dumps(asdict(outcome)))
    else:
        main()
