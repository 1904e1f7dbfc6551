"""Compare contrastive training over a whole update with sentence-transformers, and with negatives of a micro-batch.

All contenders fine-tune the packaged encoder as a reverse dictionary (see recipes/embeddings.py), on the same rows in
the same updates, with the same AdamW, schedule and clipping, in float32, without dropout and on one thread:

- window: ftaccum with `loss_over="window"`;
- window-unaudited: the same without audits, which sentence-transformers has not either;
- items: ftaccum with ordinary accumulation, where a text is compared with the pairs of its micro-batch;
- cached: sentence-transformers with `CachedMultipleNegativesRankingLoss`, installed into `.venv-peers` on first use.

Each run is a process of its own. The rounds interleave the contenders, in rotating order.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/compare_embeddings.py --updates 30 --rounds 3
"""

import argparse
import json
import os
import subprocess
import sys
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
from embeddings import PairCollator, PairEncoder, encode, read_pairs, retrieval
from embeddings_task import Clock, Outcome, Task, memory, without_dropout
from ftaccum import plan, test_fine_tuning
from ftaccum.losses import MultipleNegativesRankingLoss
from measuring import machine

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / ".venv-peers"
PEER_PACKAGE = "sentence-transformers[train]==6.2.0"
SIDES = ("definition", "word")
COLUMNS = (
    "", "seconds per update (range)", "peak memory, MB", "of it in training, MB", "recall@1", "recall@10", "MRR",
    "largest difference of losses",
)  # fmt: skip


def n_rows(batch: Any) -> int:
    return len(batch["labels"])


OURS: dict[str, dict[str, Any]] = {
    "window": {"loss_over": "window"},
    "window-unaudited": {"loss_over": "window", "audit": False},
    "items": {"loss_over": "items", "planner": False, "audit": False, "count_items": n_rows},
}


def tokenised(pairs: list[tuple[str, str]], tokenizer: Any, max_length: int) -> Dataset:
    sides = zip(*pairs, strict=True)
    return encode(Dataset.from_dict(dict(zip(SIDES, sides, strict=True))), tokenizer, SIDES, max_length)


@torch.no_grad()
def embed(model: PairEncoder, rows: Dataset, collate: PairCollator, batch_size: int) -> list[list[list[float]]]:
    model.eval()
    found = []
    for part in rows.iter(batch_size):
        batch = collate([dict(zip(part, values, strict=True)) for values in zip(*part.values(), strict=True)])
        batch.pop("labels")
        found.append(model(**batch))
    return [torch.cat([part[side] for part in found]).tolist() for side in ("anchor", "positive")]


def train_ours(task: Task, options: dict[str, Any]) -> Outcome:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    train, val = (tokenised(pairs, tokenizer, task.max_length) for pairs in (task.train, task.val))
    collate = PairCollator(tokenizer.pad_token_id)
    model, clock = PairEncoder(AutoModel.from_pretrained(task.model)), Clock()
    without_dropout(model)
    before = memory().now
    result = test_fine_tuning(
        model, train_data=train, validation_split=0.0, n_epochs=1, batch_size=task.batch_size,
        effective_batch_size=task.effective_batch_size, data_collator=collate, learning_rate=task.learning_rate,
        warmup_steps=task.warmup_steps, weight_decay=task.weight_decay, gradient_clip_norm=task.clip,
        random_seed=task.seed, loss_fn=MultipleNegativesRankingLoss(scale=task.scale), callbacks=[clock],
        progress=False, verbosity="quiet", **options,
    )  # fmt: skip
    peak = memory().peak
    held_out = embed(model, val, collate, task.batch_size)
    return Outcome(result.loss_history, np.diff(clock.ends).tolist(), before, peak, held_out)


def make_task(updates: int, n_val: int, seed: int) -> Task:
    packaged.prepare_named(str(packaged.MINILM), str(packaged.WORDS_TRAIN))
    sizes: dict[str, Any] = {"batch_size": 16, "effective_batch_size": 512}
    train, val = (
        [(row[SIDES[0]], row[SIDES[1]]) for row in read_pairs(str(path), SIDES, limit).to_list()]
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


def metrics(outcome: Outcome) -> dict[str, float]:
    anchors, positives = map(np.asarray, outcome.held_out)
    return retrieval(EvalPrediction((anchors, positives), np.arange(len(anchors))))


def report(found: dict[str, list[Outcome]]) -> None:
    """Print a table. The curve of a contender is compared with that of `cached`, in the same round."""
    print(f"\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for name, outcomes in found.items():
        times = [median(outcome.seconds) for outcome in outcomes]
        peak, training = (
            max(values) / 1e6 for values in zip(*((o.peak, o.peak - o.before) for o in outcomes), strict=True)
        )
        both = zip(outcomes, found.get("cached", []), strict=False)
        differences = [np.abs(np.subtract(one.losses, other.losses)).max() for one, other in both]
        print(
            f"| {name} | {median(times):.2f} ({min(times):.2f}–{max(times):.2f}) | {peak:.0f} | {training:.0f} | "
            + " | ".join(f"{value:.3f}" for value in metrics(outcomes[0]).values())
            + f" | {f'{max(differences):.1e}' if differences else '–'} |"
        )
    for name, outcomes in found.items():
        print(f"\nLosses of {name}: {' '.join(f'{loss:.4f}' for loss in outcomes[0].losses)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=[*OURS, "cached"], default=[*OURS, "cached"])
    given = parser.parse_args()
    found: dict[str, list[Outcome]] = {name: [] for name in given.only}
    with TemporaryDirectory() as name:
        folder = Path(name)
        task_file = folder / "task.json"
        task_file.write_text(json.dumps(vars(make_task(given.updates, given.held_out, given.seed))))
        for n in range(given.rounds):
            for k in range(len(given.only)):
                contender = given.only[(n + k) % len(given.only)]
                found[contender].append(run(contender, task_file, folder))
                seconds = median(found[contender][-1].seconds)
                print(f"round {n + 1}: {contender}, {seconds:.2f} s per update", file=sys.stderr, flush=True)
    print(machine())
    report(found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contender"]:
        outcome = train_ours(Task(**json.loads(Path(sys.argv[3]).read_text())), OURS[sys.argv[2]])
        Path(sys.argv[4]).write_text(json.dumps(vars(outcome)))
    else:
        main()
