"""Compare the loss and the gradient norm of each update with 32 rows in one batch and in 8 micro-batches of 4.

The packaged MiniLM encoder with a new head trains on film reviews, without dropout, in float32, with AdamW. Plain
PyTorch, Transformers' Trainer, `exact(Trainer)` and ftaccum have the same rows in the same order. The script prints the
tables of README.md and docs/exactness.md.

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
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import packaged
from ftaccum import exact, plan, test_fine_tuning

N_ROWS, RATE = 160, 1e-5
SIZES = {"32 × 1": (32, 1), "4 × 8": (4, 8)}  # physical batch × k


NAMES = {"`Trainer`": "Trainer", "`exact(Trainer)`": "exact(Trainer)", "ftaccum": "ftaccum"}


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


def in_order(rows: Dataset) -> Dataset:
    """Return the rows in the order in which ftaccum's plan takes them."""
    return rows.select(
        n for window in plan(N_ROWS, batch_size=32, validation_split=0.0).windows(0) for n in window.rows
    )


def with_pytorch(rows: Dataset, collate: Any) -> tuple[list[float], list[float]]:
    """Return the loss and the gradient norm of each update with one batch of 32 rows."""
    model, losses, norms = new_model(), [], []
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}])
    n_updates = N_ROWS // 32
    model.train()
    for update in range(n_updates):
        loss = model(**collate([rows[n] for n in range(32 * update, 32 * update + 32)])).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - update / n_updates)
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def with_trainer(
    trainer_class: Any, rows: Dataset, tokenizer: Any, batch_size: int, k: int
) -> tuple[list[float], list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=batch_size, gradient_accumulation_steps=k,
            learning_rate=RATE, weight_decay=0.01, logging_steps=1, save_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = trainer_class(new_model(), arguments, train_dataset=rows, processing_class=tokenizer)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [float(entry["loss"]) for entry in logs], [float(entry["grad_norm"]) for entry in logs]


def show(runs: dict[str, tuple[list[float], list[float]]], columns: dict[str, str]) -> None:
    """Print a table of the losses and norms of some runs.

    Args:
        columns: the headings of the columns, and the run of each.
    """
    print("| update | " + " | ".join(columns) + " |\n|" + " --- |" * (len(columns) + 1))
    for n in range(N_ROWS // 32):
        cells = (f"{runs[run][0][n]:.6f} ({runs[run][1][n]:.3f})" for run in columns.values())
        print(f"| {n + 1} | " + " | ".join(cells) + " |")
    print()


def main() -> None:
    packaged.prepare(packaged.MINILM, packaged.MOVIES_TRAIN)
    tokenizer = AutoTokenizer.from_pretrained(packaged.MINILM)
    rows = Dataset.from_csv(str(packaged.MOVIES_TRAIN)).select(range(N_ROWS))
    rows = rows.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    ordered = in_order(rows)
    runs = {"PyTorch": with_pytorch(ordered, DataCollatorWithPadding(tokenizer))}
    for name, (batch_size, k) in SIZES.items():
        runs[f"Trainer, {name}"] = with_trainer(InOrder, ordered, tokenizer, batch_size, k)
        runs[f"exact(Trainer), {name}"] = with_trainer(exact(InOrder), ordered, tokenizer, batch_size, k)
        runs[f"ftaccum, {name}"] = with_ftaccum(rows, batch_size, k)
    print(f"transformers {transformers.__version__}, {N_ROWS} rows; loss of each update (gradient norm)\n")
    short = {f"{which}, 4 × 8": f"{name}, 4 × 8" for which, name in NAMES.items()}
    show(runs, {"PyTorch, 32 × 1": "PyTorch", **short})
    show(runs, {run: run for run in runs if run != "PyTorch"})
    wanted = runs["PyTorch"][0]
    for run, (losses, _) in runs.items():
        worst = max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True))
        print(f"{run}: largest relative difference from PyTorch {worst:.1e}")


if __name__ == "__main__":
    main()
