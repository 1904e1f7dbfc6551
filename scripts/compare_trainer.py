"""Compare the loss that ftaccum and Transformers' Trainer report for each update, at batch 32 × 1 and at batch 4 × 8.

The packaged MiniLM encoder with a new head trains on film reviews, without dropout, in float32, with AdamW. All four
runs have the same rows in the same order. The script prints the table of docs/exactness.md.

    .venv/bin/python scripts/compare_trainer.py
"""

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))

import torch
import transformers
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

import packaged
from ftaccum import plan, test_fine_tuning

N_ROWS, RATE = 160, 1e-5
SIZES = {"32 × 1": (32, 1), "4 × 8": (4, 8)}  # physical batch × k


class InOrder(Trainer):
    """A Trainer that takes rows in the order of the data set."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


def new_model() -> Any:
    set_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return AutoModelForSequenceClassification.from_pretrained(packaged.MINILM, num_labels=2, **dropout)


def with_ftaccum(rows: Dataset, batch_size: int, k: int) -> tuple[list[float], list[float]]:
    with contextlib.redirect_stdout(io.StringIO()):
        result = test_fine_tuning(
            new_model(), train_data=rows, n_epochs=1, validation_split=0.0, batch_size=batch_size,
            gradient_accumulation_steps=k, learning_rate=RATE, progress=False,
        )  # fmt: skip
    return result.loss_history, result.grad_norm_history


def with_trainer(rows: Dataset, tokenizer: Any, batch_size: int, k: int) -> tuple[list[float], list[float]]:
    order = [n for window in plan(N_ROWS, batch_size=32, validation_split=0.0).windows(0) for n in window.rows]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=batch_size, gradient_accumulation_steps=k,
            learning_rate=RATE, weight_decay=0.01, logging_steps=1, save_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = InOrder(new_model(), arguments, train_dataset=rows.select(order), processing_class=tokenizer)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [float(entry["loss"]) for entry in logs], [float(entry["grad_norm"]) for entry in logs]


def main() -> None:
    packaged.prepare()
    tokenizer = AutoTokenizer.from_pretrained(packaged.MINILM)
    rows = Dataset.from_csv(str(packaged.MOVIES_TRAIN)).select(range(N_ROWS))
    rows = rows.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    runs = {}
    for name, (batch_size, k) in SIZES.items():
        runs[f"ftaccum, {name}"] = with_ftaccum(rows, batch_size, k)
        runs[f"Trainer, {name}"] = with_trainer(rows, tokenizer, batch_size, k)
    columns = [f"{who}, {name}" for who in ("ftaccum", "Trainer") for name in SIZES]
    print(f"transformers {transformers.__version__}, {N_ROWS} rows, loss reported for each update (gradient norm)\n")
    print("| update | " + " | ".join(columns) + " |\n|" + " --- |" * (len(columns) + 1))
    for n in range(len(runs[columns[0]][0])):
        cells = (f"{runs[c][0][n]:.6f} ({runs[c][1][n]:.3f})" for c in columns)
        print(f"| {n + 1} | " + " | ".join(cells) + " |")
    (one, _), (other, _) = runs["ftaccum, 32 × 1"], runs["ftaccum, 4 × 8"]
    worst = max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))
    print(f"\nLargest relative difference between ftaccum's two columns: {worst:.1e}")


if __name__ == "__main__":
    main()
