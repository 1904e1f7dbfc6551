"""Fine-tune a text classifier on a CSV file with the columns `text` and `label`, using ftaccum."""

import argparse

import torch
import torch.nn.functional as F
from datasets import load_dataset
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from ftaccum import test_fine_tuning

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="bert-base-uncased")
parser.add_argument("--csv", default="reviews.csv")
parser.add_argument("--output_dir", default="outputs/after")
parser.add_argument("--evaluate_every", type=int, default=200)
options = parser.parse_args()

rows = load_dataset("csv", data_files=options.csv, split="train").class_encode_column("label")
rows = rows.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")
names = rows["train"].features["label"].names
counts = torch.bincount(torch.tensor(rows["train"]["label"]))
weights = counts.sum() / (len(counts) * counts)  # rare classes count more

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForSequenceClassification.from_pretrained(options.model, id2label=dict(enumerate(names)))


def loss_fn(outputs, batch):
    return F.cross_entropy(outputs.logits, batch["labels"], weight=weights.to(outputs.logits))


class ShowPredictions(TrainerCallback):
    def __init__(self, texts):
        self.texts = texts

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        inputs = tokenizer(self.texts, padding=True, truncation=True, return_tensors="pt").to(model.device)
        with torch.no_grad():
            classes = model(**inputs).logits.argmax(-1)
        for text, n in zip(self.texts, classes.tolist(), strict=True):
            print(f"step {state.global_step}: {model.config.id2label[n]!r} for {text!r}")


def compute_metrics(prediction):
    return {"f1": f1_score(prediction.label_ids, prediction.predictions.argmax(-1), average="macro")}


result = test_fine_tuning(
    model,
    train_data=rows["train"],
    val_data=rows["test"],
    tokenizer=tokenizer,
    loss_fn=loss_fn,
    compute_metrics=compute_metrics,
    callbacks=[ShowPredictions(rows["test"]["text"][:3])],
    output_dir=options.output_dir,
    n_epochs=3,
    batch_size=8,
    gradient_accumulation_steps=4,
    learning_rate=5e-5,
    warmup_ratio=0.1,
    weight_decay=0.01,
    evaluate_every=options.evaluate_every,
    keep_checkpoints=2,
    restore_best_weights=True,
    metric_for_best="f1",
    log_every=50,
    log_with="tensorboard",
)
