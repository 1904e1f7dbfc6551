"""Compare one update of 32 rows at k = 1 and k = 8 in plain PyTorch, ftaccum and Transformers' Trainer.

The script prints the table of the README. The model is a tiny BERT classifier built from a config, without dropout, in
float32. All runs start from the same weights and use the same rows of different lengths.

    .venv/bin/python scripts/readme_table.py
"""

import contextlib
import io
import os
import tempfile
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from ftaccum import test_fine_tuning

N_ROWS, VOCABULARY, LONGEST = 32, 100, 40


def new_model() -> BertForSequenceClassification:
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=2, **sizes, **dropout))


def make_rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, n: int) -> list[int]:
        return torch.randint(low, high, (n,), generator=generator).tolist()

    lengths, labels = draw(3, LONGEST, N_ROWS), draw(0, 2, N_ROWS)
    return [{"input_ids": draw(5, VOCABULARY, n), "labels": label} for n, label in zip(lengths, labels, strict=True)]


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def with_pytorch(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the loss and the gradient norm of one batch of all rows."""
    model = new_model()
    loss = model(**collate(rows)).loss
    loss.backward()
    return loss.item(), nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()


def with_ftaccum(rows: list[dict[str, Any]], k: int) -> tuple[float, float]:
    result = test_fine_tuning(
        new_model(), train_data=rows, batch_size=N_ROWS // k, gradient_accumulation_steps=k, max_updates=1,
        validation_split=0.0, progress=False,
    )  # fmt: skip
    return result.loss_history[0], result.grad_norm_history[0]


def with_trainer(rows: list[dict[str, Any]], k: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=N_ROWS // k, gradient_accumulation_steps=k,
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(new_model(), arguments, train_dataset=Dataset.from_list(rows), data_collator=collate)
        trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    return float(entry["loss"]), float(entry["grad_norm"])


def main() -> None:
    rows = make_rows()
    with contextlib.redirect_stdout(io.StringIO()):
        table = {
            "one batch, plain PyTorch": with_pytorch(rows),
            "ftaccum, k = 1": with_ftaccum(rows, 1),
            "ftaccum, k = 8": with_ftaccum(rows, 8),
            "`Trainer`, k = 1": with_trainer(rows, 1),
            "`Trainer`, k = 8": with_trainer(rows, 8),
        }
    print(f"transformers {transformers.__version__}, torch {torch.__version__}\n")
    print("| 32 rows | loss | gradient norm |\n| --- | --- | --- |")
    for name, (loss, norm) in table.items():
        print(f"| {name} | {loss:.6f} | {norm:.6f} |")


if __name__ == "__main__":
    main()
