"""Train the quickstart's task in plain PyTorch, and print the held-out accuracy to compare with.

The loop has the rows, model, learning rate, schedule, clipping and epochs of recipes/text_classification.yaml, at batch
32. It uses neither gradient accumulation nor ftaccum. `scripts/recipe_baselines.py` has other methods.

    .venv/bin/python scripts/plain_baseline.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))

import torch
import yaml
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
    set_seed,
)

import packaged

BATCH = 32


def main() -> None:
    packaged.prepare(packaged.MINILM, packaged.MOVIES_TRAIN)
    settings = yaml.safe_load(Path(packaged.__file__).parents[1].joinpath("text_classification.yaml").read_text())
    tokenizer = AutoTokenizer.from_pretrained(packaged.MINILM)
    train, val = (
        Dataset.from_csv(str(path)).map(lambda row: tokenizer(row["text"], truncation=True), remove_columns=["text"])
        for path in (packaged.MOVIES_TRAIN, packaged.MOVIES_VAL)
    )
    train = train.select(range(settings["max_train_rows"]))
    pad = DataCollatorWithPadding(tokenizer)
    set_seed(42)
    model = AutoModelForSequenceClassification.from_pretrained(packaged.MINILM, num_labels=2)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings["learning_rate"])
    starts = range(0, len(train), BATCH)
    schedule = get_linear_schedule_with_warmup(optimizer, round(settings["warmup_ratio"] * len(starts)), len(starts))

    order = torch.randperm(len(train)).tolist()
    model.train()
    for n, start in enumerate(starts):
        loss = model(**pad([train[i] for i in order[start : start + BATCH]])).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if n % 20 == 0:
            print(f"update {n + 1} of {len(starts)}: loss {loss.item():.4f}", file=sys.stderr)

    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(val), BATCH):
            batch = pad([val[i] for i in range(start, min(start + BATCH, len(val)))])
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    print(f"plain PyTorch, batch {BATCH}: held-out accuracy {right / len(val):.1%}")


if __name__ == "__main__":
    main()
