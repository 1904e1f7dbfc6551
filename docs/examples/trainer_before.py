"""Fine-tune a text classifier on a CSV file with the columns `text` and `label`, using Transformers' Trainer."""

import argparse

import torch
import torch.nn.functional as F
from datasets import load_dataset
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="bert-base-uncased")
parser.add_argument("--csv", default="reviews.csv")
parser.add_argument("--output_dir", default="outputs/before")
parser.add_argument("--evaluate_every", type=int, default=200)
options = parser.parse_args()

rows = load_dataset("csv", data_files=options.csv, split="train").class_encode_column("label")
rows = rows.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")
names = rows["train"].features["label"].names
counts = torch.bincount(torch.tensor(rows["train"]["label"]))
weights = counts.sum() / (len(counts) * counts)  # rare classes count more

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForSequenceClassification.from_pretrained(options.model, id2label=dict(enumerate(names)))
tokenized = rows.map(lambda batch: tokenizer(batch["text"], truncation=True), batched=True)


class WeightedTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels, weight=weights.to(outputs.logits))
        return (loss, outputs) if return_outputs else loss


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


arguments = TrainingArguments(
    output_dir=options.output_dir,
    num_train_epochs=3,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=4,
    learning_rate=5e-5,
    warmup_steps=0.1,
    weight_decay=0.01,
    eval_strategy="steps",
    eval_steps=options.evaluate_every,
    save_steps=options.evaluate_every,
    save_total_limit=2,
    load_best_model_at_end=True,
    metric_for_best_model="f1",
    logging_steps=50,
    report_to="tensorboard",
)
trainer = WeightedTrainer(
    model,
    arguments,
    train_dataset=tokenized["train"],
    eval_dataset=tokenized["test"],
    processing_class=tokenizer,
    compute_metrics=compute_metrics,
    callbacks=[ShowPredictions(rows["test"]["text"][:3])],
)
trainer.train()
trainer.save_model()
